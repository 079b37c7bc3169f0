"""A log as Markdown for a comment on a pull request."""

from __future__ import annotations

import re

from devguard.logs.markdown import format_markdown
from devguard.logs.summary import Summary
from tests.helpers.logs import EVIL, judged, process, site, summary


def markdown(found: Summary) -> str:
    return "\n".join(format_markdown(found))


def cells(row: str) -> list[str]:
    """Return the cells of a row of a table, as GitHub splits them."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_table_has_a_row_for_each_call_site() -> None:
    found = markdown(summary(site(ranks=["1", "2"], via="zmq"), site(0, file="", door="native", bytes=0, count=4)))
    assert found.startswith(
        "### devguard: 2 lines with strays\n\n1 process, 5 strays at 2 call sites, 1.0 MiB.\n\n| size |"
    )
    head, rule, *rows = [cells(line) for line in found.splitlines() if line.startswith("|")]
    assert len(head) == len(rule) == 5
    assert rows == [
        ["1.0 MiB", "1", "`load: cuda:0` `observed`", "`serve.py:43 in receive` `via zmq`", "`ranks 1, 2`"],
        ["0 B", "4", "`native: cuda:0` `observed`", "`no line of user code`", "`pids 7`"],
    ]


def test_records_that_are_no_strays_are_folded() -> None:
    found = markdown(summary(site(action="kept", count=2)))
    assert found.startswith("### devguard: no strays\n")
    assert "<details><summary>Not counted as strays: 2 kept</summary>\n\n| size" in found
    assert found.endswith("\n\n</details>")


def test_the_gate_shows_what_is_new_and_what_vanished() -> None:
    found = markdown(judged(site(), site(90, function="send"), known=[site(), site(function="gone")]))
    assert found.startswith("### devguard: fails, 1 new line with strays\n")
    assert "that are not among the 1 known call site of `base.json`." in found
    assert found.count("`serve.py:90 in send`") == 1
    assert "serve.py:43 in receive" not in found
    assert "\n- `load [observed], owner cuda, at serve.py:43 in gone`" in found
    assert markdown(judged(site(), known=[site()])).startswith("### devguard: passes\n")
    assert markdown(judged(site())).startswith("### devguard: fails, 1 line with strays\n")


def test_processes_that_died_alerts_and_damage_are_listed() -> None:
    died = process(8, ended=False, end="killed", signal="SIGKILL", rank="3", contexts=["cuda:0"])
    found = markdown(summary(processes=[died, process(7, alerts=["the guard is off"])], damaged=["1.jsonl:2"]))
    assert "\n- pid 8 (rank `3`): `killed by SIGKILL`, owned `cuda:1`, contexts `cuda:0`\n" in found
    assert "\n- pid 7: `the guard is off`\n" in found
    assert found.endswith("\n- `1.jsonl:2`")


def test_a_long_log_fits_a_comment() -> None:
    ranks = [str(rank) for rank in range(512)]
    sites = [
        site(line, function="f" * 10_000, devices=["cuda:0"] * 100, ranks=ranks, note="n" * 900) for line in range(99)
    ]
    processes = [process(pid, alerts=["a" * 900]) for pid in range(99)]
    found = markdown(summary(*sites, processes=processes, damaged=["d" * 900] * 99))
    assert "and 59 more lines" in found
    assert "\n- and 59 more" in found
    assert len(found) < 65_536


def test_whatever_a_log_holds_stays_in_its_cell_and_is_no_markup() -> None:
    evil = site(door=EVIL, action=EVIL, file=EVIL, function=EVIL, devices=[EVIL], owners=[EVIL], via=EVIL, note=EVIL)
    kept = site(action="kept", function=EVIL, ranks=[EVIL])
    died = process(8, end="killed", signal=EVIL, host=EVIL, command=EVIL, owner=EVIL, contexts=[EVIL], rank=EVIL)
    for found in (
        summary(evil, kept, processes=[died, process(alerts=[EVIL])], damaged=[EVIL]),
        judged(evil, kept, known=[site(function=EVIL)]),
    ):
        text = markdown(found)
        assert text.replace("\n", "").isprintable()
        rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
        assert {len(row) for row in rows} == {5}
        for line in text.splitlines():
            outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line)
            assert not re.search(r"@user|<b>|\x1b", outside), outside
