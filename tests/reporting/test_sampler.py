"""Samples of GPU memory, with stand-ins for torch's counters; the placement test of this name has real ones."""

from __future__ import annotations

import _thread
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devguard.logs import reader as log_reader
from devguard.reporting import log_file, sampler
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence

pytestmark = pytest.mark.usefixtures("clean")

RESERVED = {"cuda:1": 2 << 20}


@pytest.fixture(autouse=True)
def _gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in for a process with contexts on the devices in `RESERVED`, and sample without a pause."""
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.005)
    monkeypatch.setattr("devguard.support.accelerator.contexts", lambda: [int(tag[5:]) for tag in RESERVED])
    monkeypatch.setattr("devguard.support.allocator.statistics", statistics)
    yield
    RESERVED.clear()
    RESERVED["cuda:1"] = 2 << 20
    if journal.log is not None:
        journal.log.stop()


def statistics(index: int) -> dict[str, Any]:
    reserved = RESERVED[f"cuda:{index}"]
    return {
        "allocated_bytes": {"all": {"current": reserved // 2, "peak": reserved}},
        "reserved_bytes": {"all": {"current": reserved, "peak": reserved}},
    }


def samples(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line)["now"] for line in file.read_text().splitlines() if '"now"' in line]


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def watch(folder: Path, age: float = 0.0) -> None:
    (folder / sampler.WATCHED).touch()
    at = time.time() - age
    os.utime(folder / sampler.WATCHED, (at, at))


def test_a_process_that_nothing_watches_writes_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []
    look = sampler.Sampler.look
    monkeypatch.setattr(sampler.Sampler, "look", lambda self: (look(self), looks.append(True)))
    watch(tmp_path, age=60.0)
    log_file.start(tmp_path, last_look=lambda when: None)
    wait_for(lambda: len(looks) > 5)
    assert samples(tmp_path) == []


def test_a_watched_process_writes_a_sample_whenever_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(tmp_path, age=-1.0)
    log_file.start(tmp_path, last_look=lambda when: None)
    wait_for(lambda: samples(tmp_path))
    RESERVED["cuda:0"] = 512
    wait_for(lambda: len(samples(tmp_path)) > 1)
    journal.record(Occurrence("load", "cuda:0", "cuda:1"), "observed")
    wait_for(lambda: len(samples(tmp_path)) > 2)
    own = {"cuda:1": [1 << 20, 2 << 20, 2 << 20]}
    both = {**own, "cuda:0": [256, 512, 512]}
    assert samples(tmp_path) == [
        {"memory": own, "strays": 0},
        {"memory": both, "strays": 0},
        {"memory": both, "strays": 1},
    ]
    assert log_reader.read(tmp_path)[2] == []  # no line is damaged


def test_a_process_that_is_watched_for_days_overwrites_its_newest_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "MOST_SAMPLED", 200)
    log_file.start(tmp_path, last_look=lambda when: None)
    log: Any = journal.log
    log._sampler.stop()
    (file,) = tmp_path.glob("*.jsonl")
    sizes, newest = [], []
    for step in range(20):
        log._write_sample({"memory": {"cuda:1": [step, step, step]}, "strays": 0})
        sizes.append(file.stat().st_size)
        newest.append(samples(tmp_path)[-1]["memory"]["cuda:1"][0])
    assert newest == list(range(20))
    assert sizes[5] == sizes[-1]
    longer = {"memory": {"cuda:1": [0, 0, 0]}, "strays": 0, "arenas": ["x" * log_file.SAMPLE_ROOM]}
    for _ in range(2):
        log._write_sample(longer)
        assert samples(tmp_path)[-1] == longer
    assert file.stat().st_size == sizes[-1] + 2 * log_file.SAMPLE_ROOM
    assert log_reader.read(tmp_path)[2] == []  # no line is damaged


def test_a_folder_to_record_in_needs_no_watcher(tmp_path: Path) -> None:
    (tmp_path / sampler.RECORDED).touch()
    log_file.start(tmp_path, last_look=lambda when: None)
    wait_for(lambda: samples(tmp_path))


def test_the_next_watcher_gets_a_sample_of_a_process_that_does_not_change(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    watching = sampler.Sampler(tmp_path, written.append, lambda: None)
    watching.stop()
    for age in (0.0, 0.0, 60.0, 0.0):
        watch(tmp_path, age)
        watching.look()
    assert len(written) == 2


def test_a_process_without_cuda_has_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *call: (started.append(call), start(*call))[1])
    RESERVED.clear()
    log_file.start(tmp_path, last_look=lambda when: None)
    assert started == []
    RESERVED["cuda:1"] = 1
    journal.note_state()
    journal.note_state()
    assert len(started) == 1


def test_an_arena_is_sampled_without_a_context(tmp_path: Path) -> None:
    RESERVED.clear()
    watch(tmp_path)
    log_file.start(tmp_path, last_look=lambda when: None)

    def usage() -> dict[str, int]:
        return {"in_use": 7}

    sampler.add_source("arenas", usage)
    try:
        wait_for(lambda: samples(tmp_path))
        assert samples(tmp_path) == [{"memory": {}, "strays": 0, "arenas": [{"in_use": 7}]}]
    finally:
        sampler.remove_source("arenas", usage)
    assert not sampler.has_subject({"contexts": []})


def test_a_sample_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[int]:
        raise RuntimeError("CUDA error")

    written: list[dict[str, Any]] = []
    watching = sampler.Sampler(tmp_path, written.append, lambda: None)
    watching.stop()
    watch(tmp_path)
    monkeypatch.setattr("devguard.support.accelerator.contexts", fail)
    watching.look()
    assert written == []


def test_the_thread_ends_with_the_log(tmp_path: Path) -> None:
    before = threading.enumerate()
    log_file.start(tmp_path, last_look=lambda when: None)
    log = journal.log
    assert log is not None
    running = log._sampler  # type: ignore[attr-defined]
    assert running._runs.locked()
    log.stop()
    assert not running._runs.acquire(blocking=False)  # `stop` has taken what the thread released at its end
    running.stop()  # a second time
    assert set(threading.enumerate()) <= set(before)


def test_a_system_without_room_for_a_thread_has_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*call: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    log_file.start(tmp_path, last_look=lambda when: None)
    journal.record(Occurrence("load", "cuda:0", "cuda:1"), "observed")
    assert len(log_reader.read(tmp_path)[1]) == 1
