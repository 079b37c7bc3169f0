"""The tables of the page."""

from __future__ import annotations

from pathlib import Path

from devguard.transport.totals import Totals
from devguard.watch.report import tables
from devguard.watch.report.run import read
from tests.helpers.journals import MIB, Log, make_run
from tests.helpers.pages import Page


def test_what_does_not_count_as_a_stray_stands_apart(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.stray(1.0, action="placed")
    page = Page(tables.list_sites(read(tmp_path), 10))
    assert page.texts[""].startswith("No strays.1 more, which do not count as strays: placed and kept")
    assert page.captions == ["Not counted as strays"]


def test_ranks_in_a_row_are_one(tmp_path: Path) -> None:
    for pid, rank in enumerate(("0", "1", "2", "3", "7", "8", "x"), 1):
        Log(tmp_path, pid, pid).stray(1.0, rank=rank)
    page = Page(tables.list_sites(read(tmp_path), 10))
    assert "; rank 0-3, 7, 8, x; owner cuda:1" in page.tables[0][1][6]
    assert "and 3 more" in page.tables[0][1][6]


def test_lines_that_are_left_out_are_counted(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    for line in range(1, 6):
        log.stray(1.0, site={"file": "/a.py", "line": line, "function": "f"})
    page = Page(tables.list_sites(read(tmp_path), 2))
    assert len(page.tables[0]) == 3
    assert "stays small: 3 more lines." in page.texts[""]


def test_an_arena_is_shown_with_all_that_was_sampled(tmp_path: Path) -> None:
    totals = Totals(puts=7, put_bytes=9 * MIB, wait_seconds=1.25, deaths=2)
    for seconds in (0.0004, 0.004):
        totals.note_release(seconds)
    oldest = {"put_at": 5.0, "site": "/a.py:3 in f", "waits_for": ["TP1"]}
    arena = {
        "kind": "cpu",
        "address": "x",
        "budget": 64 * MIB,
        "in_use": MIB,
        "peak": 40 * MIB,
        "leases": 3,
        "waiting": 1,
        "waits": 4,
        "oldest": oldest,
        "new thing": "abc",
        **totals.as_dict(),
    }
    log = Log(tmp_path, 1)
    log.state(1.0, "cpu", [], transport="host memory")
    log.sample(2.0, {}, arenas=[arena])
    page = Page(tables.list_arenas(read(tmp_path), 10))
    assert page.values == [[64 * MIB, 40 * MIB, MIB, 3, 4]]
    (row,) = page.tables[0][1:]
    assert row[:7] == ["serve.py cpu", "64.0 MiB", "40.0 MiB", "1.0 MiB", "3", "4 (1.25 s)", "p50 ≤ 0.5 ms, p99 ≤ 5 ms"]
    assert row[7] == (
        "waiting 1; oldest: put_at 5.0, site /a.py:3 in f, waits_for ['TP1']; new thing abc; puts 7; "
        "put_bytes 9.0 MiB; deaths 2"
    )
    assert "carried by: host memory" in page.texts[""]


def test_an_arena_of_another_release_is_shown_with_what_is_known(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cpu", [])
    log.sample(2.0, {}, arenas=[{"in_use": 5}])
    page = Page(tables.list_arenas(read(tmp_path), 10))
    assert page.tables[0][1][1:] == ["not known", "not known", "5 B", "not known", "0 at once", "not known", "-"]


def test_what_all_processes_share_is_said_once(tmp_path: Path) -> None:
    for pid, visible in ((1, "0"), (2, "1")):
        log = Log(tmp_path, pid, CUDA_VISIBLE_DEVICES=visible, torch="2.13.0", DEVGUARD_SIM_STATE="/x")
        log.state(1.0, "cuda:0", [])
        log.end(2.0)
    page = Page(tables.list_processes(read(tmp_path), 10))
    assert "devguard 0.1.0; torch 2.13.0; on simulated GPUs; on here" in page.texts[""]
    assert [row[6] for row in page.tables[0][1:]] == [
        "CUDA_VISIBLE_DEVICES=0; owner from install",
        "CUDA_VISIBLE_DEVICES=1; owner from install",
    ]
    assert [row[4] for row in page.tables[0][1:]] == ["ended", "ended"]


def test_a_run_on_its_own_gpus_lists_no_context(tmp_path: Path) -> None:
    Log(tmp_path, 1).state(1.0, "cuda:1", ["cuda:1"])
    page = Page(tables.list_contexts(read(tmp_path), 10))
    assert page.tables == []
    assert "No context on another GPU than the process's own. Not listed: 1 context of processes" in page.texts[""]


def test_the_end_of_each_process_is_said(tmp_path: Path) -> None:
    page = Page(tables.list_processes(read(make_run(tmp_path)), 3))
    assert [row[4] for row in page.tables[0][1:]] == ["ended", "ended", "ended"]
    assert "stays small: 1 more process." in page.texts[""]
