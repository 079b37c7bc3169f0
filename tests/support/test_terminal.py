"""Text for a terminal: nothing that changes it, and no error."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.support import terminal

ANY = st.text(st.characters(exclude_categories=()), max_size=60)


@given(ANY)
def test_printable_text_holds_nothing_that_changes_a_terminal(text: str) -> None:
    shown = terminal.printable(text)
    assert shown.isprintable()
    assert terminal.printable(shown) == shown
    kept = terminal.printable(text, keep="\n")
    assert kept.replace("\n", "").isprintable()
    assert kept.count("\n") == text.count("\n")


def test_readable_text_stays_and_the_rest_is_named() -> None:
    assert terminal.printable("Grüße, 漢字 🙂") == "Grüße, 漢字 🙂"
    assert terminal.printable("\x1b[31m\x9b\r\n\x00\u202e\udcff") == r"\x1b[31m\x9b\r\n\x00\u202e\udcff"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
@given(ANY)
def test_printing_does_not_fail_in_any_encoding(encoding: str, text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        terminal.show(text)
        patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
        terminal.complain(text)
    stream.flush()
    assert stream.buffer.getvalue().endswith("\n".encode(encoding)[-1:])  # type: ignore[attr-defined]


@given(st.dictionaries(ANY, ANY, max_size=3))
def test_json_is_ascii_without_controls_and_means_the_same(value: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        terminal.show_json(value)
        text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert text.replace("\n", "").isprintable()
    assert text.isascii()
    assert json.loads(text) == value


def columns(text: str) -> int:
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


@given(ANY, st.integers(3, 80))
def test_a_cut_text_fits(text: str, most: int) -> None:
    text = terminal.printable(text)
    shown = terminal.cut(text, most)
    assert columns(shown) <= most
    assert shown == text or (shown.endswith("...") and text.startswith(shown[:-3]) and columns(text) > most)


def test_the_width_is_that_of_the_terminal_or_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "133")
    assert terminal.width() == 133
    monkeypatch.setenv("COLUMNS", "1")
    assert terminal.width() == terminal.NARROWEST


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), (["a"], "a"), ([1, 2], "1, 2"), ([1, 2, 3], "1, 2 and 1 more"), ({"a": 0}, "a")]
)
def test_a_long_list_is_cut_and_the_rest_is_counted(values: Collection[object], text: str) -> None:
    assert terminal.list_some(values, 2) == text
