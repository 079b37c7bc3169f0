"""HTML from plain data."""

from __future__ import annotations

import pytest

from devguard.watch.report.markup import Html, element, join, moment, number, size, table, text


def test_all_text_is_escaped_once() -> None:
    inner = element("b", "<&>", title='"<x>"', data_of=3, hidden=True, lang=None, class_="a")
    assert inner == '<b title="&quot;&lt;x&gt;&quot;" data-of="3" hidden class="a">&lt;&amp;&gt;</b>'
    assert element("p", inner, "'") == f"<p>{inner}&#x27;</p>"
    assert element("input", type="range") == '<input type="range">'
    assert join(["<", Html("<br>")], "&") == "&lt;&amp;<br>"


def test_an_attribute_is_escaped_also_if_it_is_html() -> None:
    assert element("p", title=Html('" onclick="x')) == '<p title="&quot; onclick=&quot;x"></p>'


def test_characters_that_do_not_print_are_shown_as_escapes() -> None:
    assert text("a\x1b[31m\u202e\ud800\n") == r"a\x1b[31m\u202e\ud800\n"


def test_a_very_long_text_is_cut() -> None:
    assert len(text("x" * 10_000)) == 500


def test_numbers_can_be_read_by_programs() -> None:
    assert number(12345) == '<data value="12345">12,345</data>'
    assert size(1536) == '<data value="1536">1.5 KiB</data>'
    assert size(None) == "not known"


@pytest.mark.parametrize("time", [1 << 40, (1 << 40) - 0.5])
def test_a_time_that_no_calendar_has_is_shown_in_seconds(time: float) -> None:
    assert moment(time) == f"{time:.0f} s after 1970"


def test_a_time_is_local_and_exact_for_programs() -> None:
    shown = moment(1_750_000_000.25, date=True)
    assert shown.startswith('<time datetime="2025-06-1')
    assert ":40.250" in shown
    assert moment(0.0) == "not known"


def test_a_table_has_headings_for_its_columns_and_rows() -> None:
    assert table("Caption", ["a", "b"], [["1", element("td", "2", class_="x")]], class_="t") == (
        '<div class="scroll" tabindex="0" role="region" aria-label="Caption">'
        '<table class="t"><caption>Caption</caption>'
        '<thead><tr><th scope="col">a</th><th scope="col">b</th></tr></thead>'
        '<tbody><tr><th scope="row">1</th><td class="x">2</td></tr></tbody></table></div>'
    )
