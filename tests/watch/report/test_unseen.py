"""What a report says that it does not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard.watch.report import unseen
from devguard.watch.report.run import read
from tests.helpers.journals import MIB, Log, make_run


def notes(folder: Path) -> str:
    return "\n".join(unseen.describe(read(folder)))


def test_what_no_log_holds_is_always_said(tmp_path: Path) -> None:
    Log(tmp_path, 1).state(1.0, "cpu", [])
    assert "Processes without devguard, or without torch, write no log." in notes(tmp_path)
    assert "Bytes are those that torch's caching allocator holds." in notes(tmp_path)
    assert "--record" not in notes(tmp_path)  # It used no GPU.


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    assert "pid 13: killed by SIGKILL. Its last second is not known" in notes(make_run(tmp_path))
    assert "pid 10:" not in notes(tmp_path)


def test_memory_without_samples_is_named_with_what_to_do(tmp_path: Path) -> None:
    blind = Log(tmp_path, 1)
    blind.state(1.0, "cuda:1", ["cuda:1"])
    assert "No process wrote how much memory it held" in notes(tmp_path)
    assert "devguard run --log DIR --record" in notes(tmp_path)
    seen = Log(tmp_path, 2)
    seen.state(1.0, "cuda:2", ["cuda:2"])
    seen.sample(2.0, {"cuda:2": MIB})
    assert "wrote no sample of their memory, so they are not in the drawing: serve.py (pid 1)." in notes(tmp_path)


def test_a_peak_between_two_samples_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    log.write({"now": {"memory": {"cuda:1": [1, 5 * MIB, 9 * MIB]}, "strays": 0}, "time": 1_750_000_002.0})
    assert "used up to 9.0 MiB on cuda:1 between two samples" in notes(tmp_path)
    assert "the samples show 5.0 MiB at most." in notes(tmp_path)


def test_a_log_that_keeps_no_more_samples_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:1"])
    for time in (2.0, 5.0, 900.0):
        log.sample(time, {"cuda:1": int(time)})
    assert "than its log keeps" not in notes(tmp_path)
    monkeypatch.setattr("devguard.watch.report.run.MOST_SAMPLED", log.path.stat().st_size)
    assert "serve.py (pid 1) has written more samples than its log keeps" in notes(tmp_path)
    assert "known from 5 s after the start on." in notes(tmp_path)


def test_alerts_dropped_strays_damage_and_missing_parents_are_named(tmp_path: Path) -> None:
    for pid in (5, 6):
        log = Log(tmp_path, pid, parent=99)
        log.state(1.0, None, ["cuda:1"])
        log.alert("the door load stays closed")
        log.end(2.0, strays_not_kept=7 if pid == 5 else 0)
    log.write("broken")
    found = notes(tmp_path)
    assert "pid 5, 6: the door load stays closed" in found
    assert "pid 5 strayed at more lines than its journal keeps: 7 strays are not listed." in found
    assert "pid 6 strayed" not in found
    assert "1 place of the logs cannot be read: here-6-1.jsonl:5." in found
    assert "The parents of some processes wrote no log (pid 99)" in found
    assert "had no known owner, so nothing of theirs counts as a stray: serve.py (pid 5), serve.py (pid 6)." in found


def test_several_machines_have_several_clocks(tmp_path: Path) -> None:
    Log(tmp_path, 1)
    assert "clocks" not in notes(tmp_path)
    Log(tmp_path, 2, host="other")
    assert "several machines, which have clocks of their own" in notes(tmp_path)
