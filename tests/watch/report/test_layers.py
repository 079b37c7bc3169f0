"""The memory of each GPU as layers."""

from __future__ import annotations

from pathlib import Path

from devguard.watch.report.layers import stack
from devguard.watch.report.run import read
from tests.helpers.journals import MIB, START, Log, make_run


def test_own_memory_lies_below_and_strays_above(tmp_path: Path) -> None:
    run = read(make_run(tmp_path))
    first, second, *_ = stack(run, run.columns(), 100, 6)
    assert [(layer.kind, layer.places, layer.most) for layer in first.layers] == [
        ("own", (0,), 100 * MIB),
        ("stray", (1,), 7 * MIB + 512),
    ]
    assert first.layers[1].values[first.times.index(START + 8.0)] == MIB
    assert [(layer.kind, layer.places, layer.most) for layer in second.layers] == [("own", (1,), 210 * MIB)]


def test_the_smallest_of_many_processes_are_one_layer(tmp_path: Path) -> None:
    for pid in range(1, 8):
        log = Log(tmp_path, pid, pid / 100)
        log.state(1.0, "cuda:0", ["cuda:0"])
        log.sample(2.0, {"cuda:0": pid * MIB})
        log.end(5.0)
    run = read(tmp_path)
    (found,) = stack(run, run.columns(), 100, 3)
    assert [(layer.places, layer.most, layer.shade) for layer in found.layers] == [
        ((6,), 7 * MIB, 0),
        ((5,), 6 * MIB, 1),
        ((4, 3, 2, 1, 0), 15 * MIB, 0),
    ]


def test_a_process_that_finds_its_owner_late_is_two_layers(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, None, ["cuda:1"])
    log.sample(2.0, {"cuda:1": 5})
    log.state(3.0, "cuda:1", ["cuda:1"])
    log.end(4.0)
    run = read(tmp_path)
    (found,) = stack(run, run.columns(), 100, 3)
    assert {layer.kind: [value for value in layer.values if value] for layer in found.layers} == {
        "own": [5, 5],
        "unknown": [5],
    }
