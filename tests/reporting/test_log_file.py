"""The log file of one process, written in this process; tests/process/test_logs.py covers forks and kills."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import devguard
from devguard.reporting import log_file, log_reader
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
from devguard.support import notices

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    if journal.log is not None:
        journal.log.stop()


def stray(nbytes: int = 8) -> None:
    """Record a stray at one call site of this file."""
    journal.record(Occurrence("load", "cuda:0", "cuda:1", nbytes), "repaired", "cuda:1")


def lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.iterdir()
    assert file.suffix == log_file.SUFFIX
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_first_line_names_the_process_and_the_last_one_its_final_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    folder = tmp_path / "new" / "logs"
    log_file.start(folder, last_look=lambda when: None)
    stray()
    assert journal.log is not None
    journal.log.stop()
    first, row, last = lines(folder)
    assert (first["process"]["pid"], first["process"]["LOCAL_RANK"]) == (os.getpid(), "3")
    assert (row["stray"], row["source"], row["count"]) == (0, "cuda:0", 1)
    assert (last["end"]["strays"], last["end"]["contexts"], last["end"]["owned"]) == (1, [], [])
    assert journal.log is None


def test_the_log_is_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        log_file.start(tmp_path / "logs", last_look=lambda when: None)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "logs").iterdir()
    assert [oct(each.stat().st_mode & 0o777) for each in (file.parent, file)] == ["0o700", "0o600"]


def test_the_command_line_in_the_log_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "python",
        "serve.py",
        "--api-key=hunter2",
        "--hf-token",
        "hunter2",
        "DB=postgres://me:hunter2@db/x",
        "--tp=2",
    ]
    monkeypatch.setattr("sys.orig_argv", words)
    log_file.start(tmp_path, last_look=lambda when: None)
    first, *_ = lines(tmp_path)
    command = first["process"]["command"]
    assert "hunter2" not in json.dumps(first)
    assert command == "python serve.py --api-key=*** --hf-token *** DB=postgres://***@db/x --tp=2"


def test_a_new_call_site_is_written_at_once_and_grown_counts_at_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "FLUSH_INTERVAL_S", 1e9)
    log_file.start(tmp_path, last_look=lambda when: None)
    assert journal.log is not None
    for expected in ([1], [1], [1]):
        stray()
        assert [line["count"] for line in lines(tmp_path)[1:]] == expected
    journal.log.flush()
    assert [(line["stray"], line["count"]) for line in lines(tmp_path)[1:]] == [(0, 1), (0, 3)]


def test_a_stray_that_the_last_look_finds_is_in_the_file(tmp_path: Path) -> None:
    looks: list[str] = []

    def look(when: str) -> None:
        looks.append(when)
        stray(64)

    log_file.start(tmp_path, last_look=look)
    assert journal.log is not None
    journal.log.stop()
    assert looks == ["at the end of the process"]
    assert [line.get("bytes") for line in lines(tmp_path)] == [None, 64, None]


def test_a_cleared_journal_keeps_its_file_and_numbers_its_rows_on(tmp_path: Path) -> None:
    log_file.start(tmp_path, last_look=lambda when: None)
    for _ in range(2):
        stray()
        journal.clear()
    assert [line["stray"] for line in lines(tmp_path)[1:]] == [0, 1]


def test_a_folder_that_cannot_be_written_causes_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot write its log to .*kept in memory only") as caught:
        log_file.start(tmp_path / "file", last_look=lambda when: None)
    stray()
    assert len(caught) == 1
    assert len(devguard.strays()) == 1
    assert "cannot write its log" in devguard.status()["log"]


def test_alerts_are_written_whether_they_come_before_the_log_or_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "_alerts", {})
    notices.alert("before")
    log_file.start(tmp_path, last_look=lambda when: None)
    notices.alert("later")
    assert journal.log is not None
    journal.log.stop()
    notices.alert("after the end")
    assert [line["alert"] for line in lines(tmp_path) if "alert" in line] == ["before", "later"]
    (process,), _, damaged = log_reader.read(tmp_path)
    assert (process.alerts, damaged) == (["before", "later"], [])
