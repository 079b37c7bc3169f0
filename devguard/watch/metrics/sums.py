"""Counters summed over many sources, which never go backwards and outlive the sources, as Prometheus requires."""

from __future__ import annotations

from collections.abc import Hashable

from devguard.watch.metrics.families import Labels

__all__ = ["Sums"]


class Sums:
    """Sums by labels of what many sources have counted.

    A source that starts again, ends or changes its labels takes nothing away: what it has counted since the last time
    is added to the labels that it has now.

    Attributes
    ----------
    totals : dict of tuple to float
        The sums, by the values of the labels.
    """

    def __init__(self) -> None:
        self.totals: dict[Labels, float] = {}
        self._most: dict[Hashable, float] = {}

    def update(self, source: Hashable, labels: Labels, total: float) -> None:
        """Take what `source`, the same one each time, has counted since it began."""
        before = self._most.get(source, 0)
        self.totals[labels] = self.totals.get(labels, 0) + max(total - before, 0)
        self._most[source] = max(before, total)
