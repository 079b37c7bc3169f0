"""Counters over many sources never go backwards."""

from __future__ import annotations

from devguard.watch.metrics.sums import Sums


def test_sources_with_the_same_labels_are_summed() -> None:
    sums = Sums()
    for source, total in (("a", 3), ("b", 4), ("a", 5), ("a", 5)):
        sums.update(source, ("load",), total)
    assert sums.totals == {("load",): 9}


def test_a_source_that_starts_again_takes_nothing_away() -> None:
    sums = Sums()
    for total in (7, 2, 8):
        sums.update("a", (), total)
    assert sums.totals == {(): 8}


def test_new_labels_get_what_is_counted_from_then_on() -> None:
    sums = Sums()
    sums.update("a", ("train.py",), 5)
    sums.update("a", ("scheduler TP0",), 6)
    assert sums.totals == {("train.py",): 5, ("scheduler TP0",): 1}


def test_a_source_that_has_counted_nothing_has_a_series() -> None:
    sums = Sums()
    sums.update("a", ("x",), 0)
    assert sums.totals == {("x",): 0}
