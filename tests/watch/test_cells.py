"""The cells of one process at one moment; test_matrix.py has the verdicts that also need the driver's view."""

from __future__ import annotations

from devguard.watch.cells import FAULTS, VERDICTS, judge_cells
from devguard.watch.folder import Sample, State
from tests.watch.test_matrix import UUIDS, journal, site


def test_a_process_is_judged_by_the_state_and_the_sample_of_the_moment() -> None:
    log = journal(1, "cuda:1", {})
    before, after = State(0.0, None, (), (), ()), State(1.0, "cuda:1", (), ("cuda:0", "cuda:1"), ())
    small, large = Sample(1.0, {"cuda:1": (1, 2, 3)}, 0), Sample(2.0, {"cuda:0": (1, 2, 3), "cuda:1": (4, 5, 6)}, 1)
    held = [
        {uuid: (cell.verdict, cell.bytes) for uuid, cell in judge_cells(log, state, sample).items()}
        for state, sample in ((before, None), (before, small), (after, None), (after, small), (after, large))
    ]
    zero, one = UUIDS[:2]
    assert held == [
        {},
        {one: ("?", 2)},
        {zero: ("ctx", None), one: ("own", None)},
        {zero: ("ctx", None), one: ("own", 2)},
        {zero: ("STRAY", 2), one: ("own", 5)},
    ]


def test_memory_of_another_process_is_known_by_the_door_ipc() -> None:
    log = journal(1, "cuda:1", {}, rows=[site("ipc", "cuda:0")])
    state = State(1.0, "cuda:1", (), ("cuda:0", "cuda:1"), ())
    assert judge_cells(log, state, None)[UUIDS[0]].verdict == "ipc"


def test_each_fault_is_a_verdict_that_is_explained() -> None:
    assert set(FAULTS) <= VERDICTS.keys()
    assert all(meaning and meaning[0].islower() for meaning in VERDICTS.values())
