"""Pieces of lines."""

from __future__ import annotations

from devguard.watch.cells import VERDICTS
from devguard.watch.screen.spans import STYLES, Span, cut_line


def test_each_verdict_has_a_style_of_its_own() -> None:
    assert STYLES.keys() == VERDICTS.keys()
    assert len({STYLES[verdict] for verdict in ("own", "STRAY", "ctx", "allowed", "?")}) == 5


def test_a_line_is_cut_to_a_width() -> None:
    line = [Span("abcdef", "red"), Span("ghij")]
    assert cut_line(line, 10) == line
    assert cut_line(line, 9) == [Span("abcdef", "red"), Span("...")]
    assert "".join(span.text for span in cut_line(line, 5)) == "ab..."
