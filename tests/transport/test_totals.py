"""The counters of an arena, as plain data."""

from __future__ import annotations

import json

from devguard.transport.totals import BOUNDS, Totals


def test_releases_are_counted_by_their_seconds_and_the_counts_are_cumulative() -> None:
    totals = Totals()
    for seconds in (0.0, 0.0005, 0.0006, 0.2, 1e6):  # a bound belongs to its own bucket, as in Prometheus
        totals.note_release(seconds)
    found = totals.as_dict()["release_seconds"]
    by_bound = dict(zip(found["bounds"], found["counts"], strict=False))
    assert (by_bound[0.0005], by_bound[0.001], by_bound[0.1], by_bound[0.25], by_bound[300.0]) == (2, 3, 3, 4, 4)
    assert found["counts"][-1] == 5
    assert len(found["counts"]) == len(BOUNDS) + 1
    assert found["sum"] == 1_000_000.2011


def test_they_are_plain_data() -> None:
    found = Totals(puts=2, put_bytes=3, wait_seconds=0.1 + 0.2, deaths=4, cancelled=5).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert [found[name] for name in ("puts", "put_bytes", "wait_seconds", "deaths", "cancelled")] == [2, 3, 0.3, 4, 5]
