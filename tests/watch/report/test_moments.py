"""The matrix at the moments of a run."""

from __future__ import annotations

import json
from pathlib import Path

from devguard.watch.cells import Cell
from devguard.watch.report.moments import Grid, show_cell
from devguard.watch.report.run import read
from tests.helpers.journals import MIB, START, Log, make_run
from tests.helpers.pages import Page


def test_where_rows_are_left_out_processes_on_gpus_of_others_stay(tmp_path: Path) -> None:
    run = read(make_run(tmp_path))
    assert Grid.of(run, 10, 10).places == [0, 1, 2, 3]
    assert Grid.of(run, 2, 10).places == [1, 2]
    assert [column.label for column in Grid.of(run, 10, 2).columns] == ["0", "1"]


def test_a_process_that_never_held_anything_has_no_row(tmp_path: Path) -> None:
    Log(make_run(tmp_path), 99).state(1.0, "cpu", [])
    run = read(tmp_path)
    assert [run.tracks[place].journal.process.pid for place in Grid.of(run, 9, 9).places] == [10, 11, 12, 13]


def test_the_last_row_counts_processes_without_a_row_too(tmp_path: Path) -> None:
    grid = Grid.of(read(make_run(tmp_path)), 1, 10)
    page = Page(grid.table(START + 6.0, "caption"))
    assert len(page.tables[0]) == 3
    assert page.values[0][-4:] == [107 * MIB + 512, 210 * MIB, 300 * MIB, 400 * MIB]


def test_the_data_of_the_slider_are_safe_in_a_script(tmp_path: Path) -> None:
    grid = Grid.of(read(make_run(tmp_path)), 10, 10)
    times = [START + 2.0, START + 6.0, START + 9.5]
    written = grid.data(times, START + 6.0)
    assert "<" not in written
    found = json.loads(written)
    assert (found["worst"], found["heads"], found["columns"]) == (1, 4, 4)
    assert [len(moment["set"]) for moment in found["moments"]] == [5, 5, 2]
    assert found["moments"][2]["set"] == [[3, 3], [1, 0, 1, MIB]]  # what is gone, and what has changed


def test_a_cell_says_its_verdict_in_words() -> None:
    assert show_cell(None) == '<td class="none">-</td>'
    assert show_cell(Cell("?", None, False)) == '<td class="unknown"><b>?</b></td>'
    assert show_cell(Cell("STRAY", 5, False)) == '<td class="stray"><b>STRAY</b> <data value="5">5 B</data></td>'
