"""The metrics of a view, with stand-ins for the driver and for the processes' logs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from devguard.support import orphans
from devguard.support.orphans import Plan
from devguard.watch.metrics.collector import LOOK_S, ORPHANS_S, Collector
from devguard.watch.metrics.families import FAMILIES
from devguard.watch.view import View
from tests.helpers.logs import EVIL
from tests.helpers.scrapes import Scrape, parse
from tests.watch.metrics.test_counters import arena, running
from tests.watch.test_folder import STATE, Writer
from tests.watch.test_gpus import GIB, NVMLError
from tests.watch.test_view import GPUS, use

MIB = 1 << 20
PID = os.getpid()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "find", lambda: Plan([], [], []))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """The log of this process, which owns cuda:1 with the UUID b."""
    writer = running(tmp_path)
    writer.line({"state": {**STATE, **GPUS}, "time": 6.0})
    return writer


def collector(folder: Path | None, clock: Clock | None = None, **options: Any) -> Collector:
    return Collector(View(folder), clock=clock or Clock(), **options)


def series(found: Collector) -> Scrape:
    """Return what Prometheus would read."""
    registry = CollectorRegistry()
    registry.register(found)
    return parse(generate_latest(registry).decode())


def test_a_process_has_a_series_for_each_gpu_with_its_owner_and_its_verdict(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "pids": {PID: 900 * MIB}}, {"uuid": "GPU-b", "pids": {PID: 300 * MIB}})
    writer.sample(7.0, 2)
    found = series(collector(writer.path.parent))
    assert found["devguard_process_gpu_memory_bytes"] == {  # gpu, gpu_uuid, owner, role, verdict
        ("0", "a", "cuda:1", "serve", "STRAY"): 900 * MIB,
        ("1", "b", "cuda:1", "serve", "own"): 300 * MIB,
    }
    assert [*found["devguard_process_gpu_context"].values()] == [1, 1]
    assert found["devguard_gpu_memory_used_bytes"] == {("0", "a"): 3 * GIB, ("1", "b"): 3 * GIB}
    assert found["devguard_gpu_memory_total_bytes"] == {("0", "a"): 80 * GIB, ("1", "b"): 80 * GIB}
    assert found["devguard_scrape_success"] == {(): 1}


def test_processes_with_equal_labels_are_summed_and_told_apart_on_request(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = running(writer.path.parent, 1)
    other.line({"state": {**STATE, **GPUS}, "time": 6.0})
    use(monkeypatch, {"uuid": "GPU-a", "pids": {1: None}}, {"uuid": "GPU-b", "pids": {1: 5 * MIB, PID: 6 * MIB}})
    found, own = series(collector(writer.path.parent)), ("1", "b", "cuda:1", "serve", "own")
    assert found["devguard_process_gpu_memory_bytes"] == {own: 11 * MIB}
    assert found["devguard_process_gpu_context"] == {own: 2, ("0", "a", "cuda:1", "serve", "ctx"): 1}
    found = series(collector(writer.path.parent, label_pid=True))
    assert found["devguard_process_gpu_memory_bytes"] == {
        (*own[:3], "1", *own[3:]): 5 * MIB,
        (*own[:3], str(PID), *own[3:]): 6 * MIB,
    }


def test_an_arena_has_gauges_while_its_process_runs_and_counters_for_ever(
    writer: Writer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    writer.sample(7.0, 2, arenas=[arena()])
    asked = collector(writer.path.parent, clock)
    found, labels = series(asked), ("serve", "cpu")
    gauges = ("in_use_bytes", "budget_bytes", "peak_bytes", "leases")
    assert [found[f"devguard_transport_{name}"] for name in gauges] == [{labels: count} for count in (1, 2, 3, 4)]
    counters = ("put_bytes", "wait_seconds", "peer_deaths", "cancelled")
    before = [found[f"devguard_transport_{name}_total"] for name in counters]
    assert before == [{labels: count} for count in (5, 8.5, 6, 7)]
    assert found["devguard_transport_release_seconds_bucket"] == {
        ("serve", "cpu", "0.1"): 1,
        ("serve", "cpu", "1.0"): 3,
        ("serve", "cpu", "+Inf"): 4,
    }
    assert found["devguard_transport_release_seconds_sum"] == {labels: 9.5}
    assert found["devguard_transport_release_seconds_count"] == {labels: 4}
    writer.line({"end": {**STATE, "time": 8.0}})
    clock.now += LOOK_S
    found = series(asked)
    assert not [name for name in gauges if f"devguard_transport_{name}" in found]
    assert [found[f"devguard_transport_{name}_total"] for name in counters] == before


@pytest.mark.parametrize("fails", ["memory", "processes", "handle"])
def test_a_gpu_that_cannot_be_read_has_no_series_and_the_scrape_says_so(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    use(monkeypatch, {"uuid": "GPU-a", "pids": {PID: 5}, "fails": [fails]}, {"uuid": "GPU-b", "pids": {PID: 5}})
    asked = collector(None)
    found = series(asked)
    if fails != "processes":
        assert found["devguard_gpu_memory_used_bytes"] == {("1", "b"): 3 * GIB}
    if fails != "memory":
        assert [labels[0] for labels in found["devguard_process_gpu_memory_bytes"]] == ["1"]
    assert found["devguard_scrape_success"] == {(): 0}
    assert asked.problem == f"GPU 0: no {fails}"


def test_where_the_driver_fails_gauges_vanish_and_counters_stay(
    writer: Writer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"uuid": "GPU-a"}, {"uuid": "GPU-b", "pids": {PID: 300 * MIB}})
    writer.row(0, 3)
    writer.sample(7.0, 2, arenas=[arena()])
    asked = collector(writer.path.parent, clock)
    before = series(asked)

    def fail() -> int:
        raise NVMLError("GPU is lost")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pynvml"], "nvmlDeviceGetCount", fail)
        clock.now += LOOK_S
        found = series(asked)
    assert before.keys() - found.keys() == {
        "devguard_process_gpu_memory_bytes",
        "devguard_process_gpu_context",
        "devguard_gpu_memory_used_bytes",
        "devguard_gpu_memory_total_bytes",
    }
    assert found["devguard_strays_total"] == before["devguard_strays_total"]
    assert found["devguard_scrape_success"] == {(): 0}
    assert asked.problem == "NVML cannot count the GPUs: GPU is lost."
    clock.now += LOOK_S
    assert series(asked) == before


def test_without_a_driver_the_processes_speak_for_themselves(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEVGUARD_SIM_STATE", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    writer.sample(7.0, 2 * MIB)
    asked = collector(writer.path.parent)
    found = series(asked)
    assert [(labels[1:], value) for labels, value in found["devguard_process_gpu_memory_bytes"].items()] == [
        (("b", "cuda:1", "serve", "own"), 2 * MIB)
    ]
    assert "devguard_gpu_memory_used_bytes" not in found  # what the processes hold is not all that is used
    assert found["devguard_scrape_success"] == {(): 0}
    assert asked.problem is not None
    assert "needs nvidia-ml-py" in asked.problem


def test_a_folder_that_is_gone_leaves_the_counters(
    writer: Writer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"uuid": "GPU-b", "pids": {PID: 300 * MIB}})
    writer.row(0, 3)
    asked = collector(writer.path.parent, clock)
    before = series(asked)
    for file in writer.path.parent.iterdir():
        file.unlink()
    writer.path.parent.rmdir()
    clock.now += LOOK_S
    found = series(asked)
    assert asked.problem is not None
    assert "is not a folder" in asked.problem
    assert "devguard_process_gpu_context" not in found
    assert found["devguard_strays_total"] == before["devguard_strays_total"] != {}


def test_a_fault_of_ours_is_a_failed_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    asked = collector(None)
    monkeypatch.setattr(View, "look", lambda self: [][0])
    assert series(asked)["devguard_scrape_success"] == {(): 0}
    assert asked.problem == "IndexError: list index out of range"


def test_scrapes_within_a_second_share_one_look(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    looks: list[float] = []
    look = View.look
    monkeypatch.setattr(View, "look", lambda self: (looks.append(clock.now), look(self))[1])
    asked = collector(None, clock)
    first = series(asked)
    clock.now += LOOK_S / 2
    assert series(asked) == first
    clock.now += LOOK_S / 2
    series(asked)
    assert looks == [1000.0, 1000.0 + LOOK_S]


def test_orphans_are_looked_for_now_and_then(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    answers: list[Any] = [[5, 6], [7], OSError(13, "Permission denied"), []]

    def find() -> Plan:
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return Plan([type("Segment", (), {"size": size})() for size in found], [], [])

    monkeypatch.setattr(orphans, "find", find)
    asked, name = collector(None, clock), "devguard_shm_orphan_bytes"
    seen = []
    for seconds in (0.0, ORPHANS_S - 2, 2.0, ORPHANS_S, LOOK_S):
        clock.now += seconds
        seen.append((series(asked).get(name), asked.problem))
    failed = (None, "/dev/shm cannot be read: Permission denied")
    assert seen == [({(): 11}, None), ({(): 11}, None), ({(): 7}, None), failed, ({(): 0}, None)]


def test_what_a_log_says_cannot_break_a_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    writer = running(tmp_path, RANK=EVIL)
    writer.line({"state": {**STATE, **GPUS, "process_owner": EVIL, "owned": [EVIL]}, "time": 6.0})
    writer.line({"stray": 0, "door": EVIL, "action": EVIL, "source": EVIL, "target": EVIL, "owner": EVIL, "count": 1,
                 "bytes": 2, "pid": 1, "site": None, "via": None, "note": None})  # fmt: skip
    writer.sample(7.0, 2, arenas=[arena(kind=EVIL)])
    found = series(collector(tmp_path))
    assert found["devguard_scrape_success"] == {(): 1}
    ((labels, count),) = found["devguard_strays_total"].items()
    assert count == 1
    assert all(label.isprintable() for label in labels)
    assert found["devguard_transport_budget_bytes"] != {}


def test_every_family_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"uuid": "GPU-a"})
    described = {metric.name: metric for metric in collector(None).describe()}
    assert {name.removesuffix("_total") for name in FAMILIES} == described.keys()
    assert all(metric.documentation and not metric.samples for metric in described.values())
