"""Text out of a log for Markdown."""

from __future__ import annotations

import pytest

from devguard.support.markdown import code_span, prose


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.py:3 in f", "`a.py:3 in f`"),
        ("a`b", "`` a`b ``"),
        ("``", "``` `` ```"),
        ("a|b", "`a\\|b`"),
        ("<b>@user", "`<b>@user`"),
        ("a\nb", "`a\\nb`"),
        ("", "`  `"),
    ],
)
def test_a_code_span_ends_where_it_should(text: str, shown: str) -> None:
    assert code_span(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with (brackets): 1.5 - 2", "plain, with (brackets): 1.5 - 2"),
        ("a_b *c* `d` [e](f) ~g~ |", r"a\_b \*c\* \`d\` \[e\](f) \~g\~ \|"),
        ("<script>&amp;", "&lt;script>&amp;amp;"),
        ("@user #12 #x", "@&#8203;user #&#8203;12 #x"),
        ("see http://a or www.b", "see http:&#8203;//a or www.&#8203;b"),
        ("a\nb\x1b", r"a\\nb\\x1b"),
    ],
)
def test_prose_has_no_meaning_in_markdown(text: str, shown: str) -> None:
    assert prose(text) == shown


def test_both_are_cut() -> None:
    assert code_span("x" * 300, 10) == "`xxxxxxx...`"
    assert prose("x" * 300, 10) == "xxxxxxx..."
