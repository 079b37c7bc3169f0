"""The log file of one process, written in this process; tests/process/test_logs.py covers forks and kills."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import devguard
from devguard.logs import reader as log_reader
from devguard.reporting import log_file
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


@pytest.fixture(autouse=True)
def _no_alerts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the alerts of earlier tests, which a new log would begin with."""
    monkeypatch.setattr(notices, "_alerts", {})


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
    assert command == "python serve.py --api-key=*** --hf-token *** *** --tp=2"


def test_every_stray_is_in_the_file_at_once_in_the_line_of_its_call_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "FLUSH_INTERVAL_S", 1e9)
    log_file.start(tmp_path, last_look=lambda when: None)
    assert journal.log is not None
    for expected in range(1, 130):
        stray(1 << 40)
        assert [(line["count"], line["bytes"]) for line in lines(tmp_path)[1:]] == [(expected, expected << 40)]
    journal.log.flush()
    assert [(line["stray"], line["count"]) for line in lines(tmp_path)[1:]] == [(0, 129)]


@pytest.mark.parametrize("writer", ["truncates", "writes between"])
def test_counts_stay_right_where_another_program_changes_the_file(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_file.start(tmp_path, last_look=lambda when: None)
    (file,) = tmp_path.iterdir()
    write = os.write

    def both(descriptor: int, data: bytes) -> int:
        with file.open("ab") as other:
            other.write(b'{"other": 1}\n')
        return write(descriptor, data)

    if writer == "writes between":
        monkeypatch.setattr(os, "write", both)
    for expected in range(1, 6):
        stray()
        _, (site,), damaged = log_reader.read(tmp_path)
        assert (site.count, damaged) == (expected, [])
        if writer == "truncates":
            os.truncate(file, 0)


def test_strays_of_several_threads_are_all_in_the_file(tmp_path: Path) -> None:
    log_file.start(tmp_path, last_look=lambda when: None)

    def repeat(number: int) -> None:
        for _ in range(100):
            journal.record(Occurrence("load", f"cuda:{number}", "cuda:9", 1), "repaired", "cuda:9")

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {line["source"]: line["count"] for line in lines(tmp_path) if "stray" in line}
    assert counts == {f"cuda:{number}": 100 for number in range(4)}


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


OBSTACLES = {
    "a file": lambda path: path.write_text(""),
    "too long": lambda path: None,
    "a link to itself": lambda path: path.symlink_to(path),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("action", ["ignore", "error", "always"])
def test_a_folder_that_cannot_be_written_is_reported_once_whatever_the_filter(
    obstacle: str, action: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("file" * 100 if obstacle == "too long" else "file")
    OBSTACLES[obstacle](folder)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        log_file.start(folder, last_look=lambda when: None)
        stray()
        stray()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("cannot write its log to") == err.count("kept in memory only") == 1
    assert [found.count for found in devguard.strays()] == [2]
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


@pytest.mark.parametrize("failure", ["no space", "partial", "closed", "not an OSError"])
def test_a_write_that_fails_later_is_reported_once_and_the_strays_are_kept(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log_file.start(tmp_path, last_look=lambda when: None)
    stray()

    def write(descriptor: int, data: bytes) -> int:
        if failure == "partial":
            return 3
        raise (ValueError if failure == "not an OSError" else OSError)(28, "No space left on device")

    monkeypatch.setattr("devguard.support.append_file.os.write", write)
    monkeypatch.setattr("devguard.support.append_file.os.pwrite", lambda file, data, at: write(file, data))
    for _ in range(3):
        stray()
    stray()
    assert journal.log is not None
    journal.log.stop()
    monkeypatch.undo()
    assert capfd.readouterr().err.count("cannot write its log") == 1
    assert sum(found.count for found in devguard.strays()) == 5


def test_doors_that_open_again_go_on_in_the_same_file_with_no_row_counted_twice(tmp_path: Path) -> None:
    for _ in range(5):
        log_file.start(tmp_path, last_look=lambda when: None)
        for _ in range(2):
            stray()
        assert journal.log is not None
        (process,), _, damaged = log_reader.read(tmp_path)
        assert (process.ended, damaged) == (False, [])
        journal.log.stop()
    (process,), (site,), damaged = log_reader.read(tmp_path)
    assert (process.ended, site.count, damaged) == (True, 10, [])


def test_many_starts_register_one_finalizer(tmp_path: Path) -> None:
    import multiprocessing.util as util

    log_file.start(tmp_path, last_look=lambda when: None)
    registry = util._finalizer_registry  # type: ignore[attr-defined]
    before = len(registry)
    for _ in range(20):
        assert journal.log is not None
        journal.log.stop()
        log_file.start(tmp_path, last_look=lambda when: None)
    assert len(registry) == before


def test_a_last_look_that_fails_does_not_keep_the_log_from_its_end(tmp_path: Path) -> None:
    def fail(when: str) -> None:
        raise LookupError(when)

    log_file.start(tmp_path, last_look=fail)
    assert journal.log is not None
    with pytest.warns(RuntimeWarning, match="last stray: LookupError"):
        journal.log.stop()
    assert journal.log is None


def test_the_owner_and_the_contexts_are_written_as_soon_as_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[int] = []
    monkeypatch.setattr("devguard.support.accelerator.contexts", lambda: list(contexts))
    log_file.start(tmp_path, last_look=lambda when: None)

    def states() -> list[tuple[Any, ...]]:
        rows = [line["state"] for line in lines(tmp_path) if "state" in line]
        found = [(row["process_owner"], row["owned"], row["contexts"]) for row in rows]
        return [row for row, _ in itertools.groupby(found)]  # the mode has a line as well

    assert states() == []
    with devguard.guard("cpu"):
        assert states() == [(None, ["cpu"], [])]
        contexts.append(1)
        stray()
        assert states()[1:] == [(None, ["cpu"], ["cuda:1"])]
    devguard.install("repair", "cpu")
    assert states()[2:] == [("cpu", ["cpu"], ["cuda:1"])]
    contexts.append(0)
    devguard.status()
    assert states()[3:] == [("cpu", ["cpu"], ["cuda:1", "cuda:0"])]
    (process,), _, _ = log_reader.read(tmp_path)
    assert (process.owner, process.contexts, process.ended) == ("cpu", ["cuda:1", "cuda:0"], False)


def test_contexts_that_no_door_sees_are_written_after_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "FLUSH_INTERVAL_S", 0.0)
    log_file.start(tmp_path, last_look=lambda when: None)
    monkeypatch.setattr("devguard.support.accelerator.contexts", lambda: [2])
    gc.collect()
    assert [line["state"]["contexts"] for line in lines(tmp_path) if "state" in line] == [["cuda:2"]]
    assert journal.log is not None
    journal.log.stop()
    assert not [callback for callback in gc.callbacks if "log_file" in getattr(callback, "__module__", "")]


def test_a_child_that_failed_has_a_line_if_it_has_a_log_there_also_after_the_end(tmp_path: Path) -> None:
    from devguard.support import process_file

    log_file.start(tmp_path, last_look=lambda when: None)
    (own,) = tmp_path.iterdir()
    name = own.name.replace(f"-{os.getpid()}-", "-{}-")
    for pid in (7, 71):
        (tmp_path / name.format(pid)).write_text("")
    log = journal.log
    assert isinstance(log, log_file._Log)
    log.write_child(7, -9)
    log.write_child(9, -9)  # a program without a guard
    log.stop()
    log.write_child(71, 3)
    log.write_child(7, -40)
    found = [line["child"] for line in map(json.loads, own.read_text().splitlines()) if "child" in line]
    assert found == [{"pid": 7, "signal": "SIGKILL"}, {"pid": 71, "code": 3}, {"pid": 7, "signal": "signal 40"}]
    assert process_file.has_file(tmp_path, 7)
    assert not process_file.has_file(tmp_path, 1)


def test_uninstall_puts_back_what_watches_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = subprocess.Popen._handle_exitstatus  # type: ignore[attr-defined]
    monkeypatch.setenv("DEVGUARD_LOG", str(tmp_path))
    for _ in range(2):
        devguard.install("repair", "cpu")
        assert subprocess.Popen._handle_exitstatus is not before  # type: ignore[attr-defined]
        assert devguard.uninstall() == []
        assert subprocess.Popen._handle_exitstatus is before  # type: ignore[attr-defined]
    monkeypatch.delenv("DEVGUARD_LOG")
    devguard.install("repair", "cpu")
    assert subprocess.Popen._handle_exitstatus is before  # type: ignore[attr-defined]
