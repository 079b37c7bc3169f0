"""Processes that are alike are counted together where there is no room for each."""

from __future__ import annotations

import dataclasses

from devguard.watch.screen.folding import fold
from tests.watch.screen.test_table import GIB, rank


def test_with_room_each_process_has_its_entry() -> None:
    rows = [rank(n) for n in range(5)]
    assert [entry.rows for entry in fold(rows, 5)] == [[row] for row in rows]


def test_alike_processes_of_one_gpu_are_counted_together() -> None:
    entries = fold([rank(n, gpus=2) for n in range(6)], 3)
    assert [(entry.name, entry.owner, entry.pid) for entry in entries] == [
        ("3 x rank * train.py", "cuda:0", ""),
        ("3 x rank * train.py", "cuda:1", ""),
    ]
    cell = entries[0].cell("uuid-0")
    assert cell is not None
    assert (cell.verdict, cell.bytes, entries[0].cell("uuid-1")) == ("own", 3 * 57 * GIB, None)


def test_with_less_room_all_healthy_processes_are_one_entry() -> None:
    (entry,) = fold([rank(n) for n in range(64)], 4)
    assert (entry.name, entry.owner, entry.mode) == ("64 x rank * train.py", "their own", "observe")
    assert [entry.cell(f"uuid-{n}").bytes for n in range(8)] == [8 * 57 * GIB] * 8  # type: ignore[union-attr]


def test_a_process_with_a_fault_or_a_stray_is_never_folded() -> None:
    rows = [rank(0, (1, "STRAY", 1)), rank(1, strays=1), *(rank(n) for n in range(2, 20))]
    entries = fold(rows, 1)
    assert [len(entry.rows) for entry in entries] == [1, 1, 18]
    assert [entry.is_faulty for entry in entries] == [True, False, False]
    assert entries[1].strays == 1


def test_a_fault_is_not_hidden_by_a_process_of_another_container_with_the_same_pid() -> None:
    strayed, faulty = (dataclasses.replace(row, pid=7) for row in (rank(0, strays=1), rank(1, (0, "STRAY", 1))))
    entries = fold([strayed, faulty, *(rank(n) for n in range(2, 20))], 1)
    assert [entry.rows for entry in entries[:2]] == [[strayed], [faulty]]
