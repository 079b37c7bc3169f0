"""docs/log.md: the table of actions, the options, the baseline and the gate on it are those of the code."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from devguard.cli import log
from devguard.logs import baseline_file, process_end
from devguard.logs import selection as log_selection
from devguard.logs.baseline import Key
from devguard.reporting.actions import ACTIONS
from devguard.reporting.journal import MAX_ROWS
from tests.helpers.simulated import ROOT

EXPLAINED = r"\| `placed` \|.* \| [A-Za-z]"  # a row with a column of prose
PAGE = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```\n", PAGE, re.MULTILINE | re.DOTALL)


def table(head: str) -> list[list[str]]:
    """Return the rows of the table whose first column has that head."""
    (rows,) = re.findall(rf"^\| {head} \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def test_the_table_of_actions_is_that_of_the_code() -> None:
    expected = [
        [f"`{action}`", "yes" if meaning.is_stray else "no", meaning.text] for action, meaning in ACTIONS.items()
    ]
    assert table("action") == expected


def test_no_other_page_explains_the_actions() -> None:
    others = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [page.name for page in others if re.search(EXPLAINED, page.read_text(encoding="utf-8"))]
    assert found == ["log.md"]


def test_every_option_is_on_the_page() -> None:
    parser = argparse.ArgumentParser()
    log.configure(parser)
    text = " ".join(cell for row in table("option") for cell in row)
    options = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    assert [name for name in options - {"--help"} if f"`{name}" not in text] == []
    for name in (*log.FORMATS, *log_selection.SORTS):
        assert re.search(rf"[` ]{name}`", text), name


def test_every_exit_status_and_every_end_is_on_the_page() -> None:
    assert [row[0] for row in table("exit status")] == ["0", "1", "2", str(log.FAILED)]
    assert {row[0] for row in table("`end` in JSON")} == {f"`{end}`" for end in get_args(process_end.End)}


def test_the_baseline_is_that_of_the_example_and_every_key_is_explained(tmp_path: Path) -> None:
    (shown,) = blocks("json")
    assert shown == (ROOT / "examples" / "ci" / "baseline.json").read_text(encoding="utf-8")
    file = tmp_path / "base.json"
    file.write_text(shown, encoding="utf-8")
    baseline_file.write(file, baseline_file.read(file))
    assert file.read_text(encoding="utf-8") == shown
    keys = {name for row in table("key") for name in re.findall(r"`(\w+)`", row[0])}
    assert keys == {*Key._fields, "lines", "reason"}


def test_the_gate_is_that_of_the_example() -> None:
    (shown,) = blocks("sh")
    assert shown in (ROOT / "examples" / "ci" / "gate.sh").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"keeps {MAX_ROWS:,} call sites" in PAGE


def test_the_pages_that_lead_there_do() -> None:
    for page in ("README.md", "docs/doors.md"):
        assert "log.md" in (ROOT / page).read_text(encoding="utf-8")
