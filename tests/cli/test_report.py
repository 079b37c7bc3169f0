"""``devguard report`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devguard import cli
from tests.helpers.journals import make_run
from tests.helpers.pages import Page

VERDICT = (
    "2 of 4 processes put up to 7.0 MiB and 2 contexts on GPUs that are not theirs; 8 strays at 1 line: 3 observed, 5 "
    "repaired."
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "logs")


def test_a_page_is_written_and_the_verdict_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [VERDICT, "Written to report.html."]
    assert VERDICT in Page(Path("report.html").read_text(encoding="utf-8")).texts[""]
    assert cli.main(["report", str(folder), "-o", "other.html"]) == 0
    assert Path("other.html").exists()


def test_markdown_goes_to_standard_output_or_to_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "--format", "md"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## ✗ GPUs of `logs`\n")
    assert cli.main(["report", str(folder), "--format", "md", "-o", "comment.md"]) == 0
    assert Path("comment.md").read_text(encoding="utf-8").strip() == shown.strip()
    assert not Path("report.html").exists()


def test_json_has_the_verdict_and_the_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "--json", "--before", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["strays"], found["before"]["strays"]) == (VERDICT, 8, 8)
    assert not Path("report.html").exists()
    assert cli.main(["report", str(folder), "--json", "-o", "page.html"]) == 0
    json.loads(capsys.readouterr().out)
    assert Path("page.html").exists()


def test_two_runs_have_two_verdicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "--before", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [f"Before: {VERDICT}", f"After: {VERDICT}"]


def test_damaged_lines_are_named_with_exit_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.jsonl").write_text("\x1b[31m\n")
    for options in ([], ["--format", "md"], ["--json"]):
        assert cli.main(["report", str(folder), *options]) == 1
        out = capsys.readouterr().out
        assert "x.jsonl:1" in out
        assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["logs", "--before", "nowhere"], "nowhere is not a folder"),
        (["logs", "-o", "no/folder/x.html"], "there is no folder"),
    ],
    ids=["folder", "before", "output"],
)
def test_a_wrong_path_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "-o", str(folder)]) == 1
    assert "Is a directory" in capsys.readouterr().err
