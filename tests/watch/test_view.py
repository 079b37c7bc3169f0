"""A view joins the log folder with the driver's numbers, and says what it cannot see."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard import ConfigError
from devguard.reporting import sampler
from devguard.simgpu import records
from devguard.support import process_identity
from devguard.watch import neighbours
from devguard.watch.view import View
from tests.watch.test_folder import STATE, Writer
from tests.watch.test_gpus import Library

GPUS = {"gpus": {"cuda:0": "a", "cuda:1": "b"}}


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """The log of this process, which owns cuda:1, with the UUID b."""
    pid = os.getpid()
    identity = {"started": process_identity.started(pid), "pid_space": process_identity.pid_space()}
    found = Writer(tmp_path, pid, **identity)
    found.line({"state": {**STATE, **GPUS}, "time": 6.0})
    return found


def use(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, Any], inside: bool = False) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library(list(devices)))
    monkeypatch.setattr(neighbours, "is_inside_container", lambda: inside)
    monkeypatch.delenv("DEVGUARD_SIM_STATE", raising=False)


def test_both_views_are_joined(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    use(monkeypatch, {"uuid": "GPU-a", "pids": {pid: 900 << 20}}, {"uuid": "GPU-b", "pids": {pid: 300 << 20}})
    writer.sample(7.0, 2)
    view = View(writer.path.parent)
    found = view.look()
    assert (view.driver, [journal.pid for journal in view.journals]) == ("read", [pid])
    (row,) = found.rows
    assert {uuid: (cell.verdict, cell.whole) for uuid, cell in row.cells.items()} == {
        "a": ("STRAY", True),
        "b": ("own", True),
    }
    assert found.notes == ()
    assert (writer.path.parent / sampler.WATCHED).exists()


def test_without_a_driver_the_processes_own_numbers_are_shown(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    writer.sample(7.0, 2)
    view = View(writer.path.parent)
    found = view.look()
    assert view.driver == "absent"
    assert [(cell.verdict, cell.bytes) for row in found.rows for cell in row.cells.values()] == [("own", 2)]
    assert any("nvidia-ml-py" in note for note in found.notes)
    assert view.look().notes == found.notes


def test_in_a_container_the_numbers_of_processes_are_not_taken_for_our_own(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "pids": {os.getpid(): 900 << 20}}, {"uuid": "GPU-b"}, inside=True)
    writer.sample(7.0, 2)
    found = View(writer.path.parent).look()
    assert [(uuid, cell.verdict, cell.bytes) for row in found.rows for uuid, cell in row.cells.items()] == [
        ("b", "own", 2)
    ]
    assert found.columns[0].used is not None
    assert any("container" in note for note in found.notes)


def test_a_process_of_a_container_is_found_by_its_inner_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    inside = Writer(tmp_path, 17, started=process_identity.started(pid), pid_space="container")
    inside.line({"state": {**STATE, **GPUS}, "time": 6.0})
    monkeypatch.setattr(neighbours, "inner_pids", lambda: {pid: 17, 1: 17, 5: 18})
    use(monkeypatch, {"uuid": "GPU-a"}, {"uuid": "GPU-b", "pids": {pid: 300 << 20}})
    (row,) = View(tmp_path).look().rows
    assert (row.running, row.guarded, row.cells["b"].verdict, row.cells["b"].whole) == (True, True, "own", True)


def test_only_the_chosen_processes_are_shown(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "pids": {1: 5, os.getpid(): 5}}, {"uuid": "GPU-b"})
    assert [row.pid for row in View(writer.path.parent, [1]).look().rows] == [1]
    assert [row.pid for row in View(writer.path.parent, [os.getpid()]).look().rows] == [os.getpid()]


def test_without_a_folder_the_driver_alone_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "pids": {os.getpid(): 5}})
    (row,) = View(None).look().rows
    assert (row.pid, row.guarded, row.cells["a"].verdict) == (os.getpid(), False, "?")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match=r"nvidia-ml-py.*\. Or name a log folder.*devguard watch DIR"):
        View(None)


def test_what_cannot_be_seen_is_noted(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "fails": ["memory"]}, {"uuid": "GPU-b"})
    writer.line({"alert": "this process is NOT guarded", "time": 6.0})
    writer.add(b"junk\n")
    (writer.path.parent / sampler.WATCHED).mkdir()
    notes = "\n".join(View(writer.path.parent).look().notes)
    for part in ("do not report their memory", "GPU 0 cannot be read: no memory", "is NOT guarded", ".jsonl:4"):
        assert part in notes


def test_a_simulation_that_is_gone_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    state = tmp_path / "state"
    records.create(state, memory=1 << 30, context_bytes=0)
    Writer(tmp_path, 1, DEVGUARD_SIM_STATE=str(state))
    view = View(tmp_path)
    assert view.look().notes == ()
    state.unlink()
    assert view.driver == "read"
    assert "the program has ended, and its simulated GPUs with it" in view.look().notes
    assert (view.driver, len(view.journals)) == ("failed", 1)  # also the log of a process that has ended


def test_the_simulations_of_earlier_programs_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    Writer(tmp_path, 1, DEVGUARD_SIM_STATE="/gone")
    view = View(tmp_path)
    assert "ended, and its simulated GPUs" in view.look().notes[0]
    state = tmp_path / "state"
    records.create(state, memory=1 << 30, context_bytes=0)
    pid = os.getpid()
    identity = {"started": process_identity.started(pid), "pid_space": process_identity.pid_space()}
    Writer(tmp_path, pid, **identity, DEVGUARD_SIM_STATE=str(state))
    for each in (view, View(tmp_path)):
        assert each.look().notes == ()
        assert each.driver == "read"
    state.unlink()
    assert "cannot be read" in view.look().notes[0]  # its process runs


def test_a_watcher_keeps_the_newest_sample_alone(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-b", "pids": {os.getpid(): 300 << 20}})
    view, kept = View(writer.path.parent), []
    for at in (7.0, 8.0, 9.0):
        writer.sample(at, 2)
        view.look()
        kept.append([sample.time for sample in view.journals[0].samples])
    assert kept == [[7.0], [7.0, 8.0], [8.0, 9.0]]
