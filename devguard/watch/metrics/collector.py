"""The metrics of a view for prometheus_client: one look for each scrape, and at most one a second.

Gauges are of this moment. What cannot be read has no series, so that it never looks like an idle GPU, and
``devguard_scrape_success`` is 0. Counters are summed over all processes of the log folder, those that have ended too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from devguard.errors import DevGuardError
from devguard.support import forks, orphans, shared_memory
from devguard.watch.matrix import Matrix
from devguard.watch.metrics.arenas import Arena
from devguard.watch.metrics.counters import Counters
from devguard.watch.metrics.families import FAMILIES, PROCESS, Labels, labels_of
from devguard.watch.view import View

__all__ = ["Collector"]

LOOK_S = 1.0  # A look holds a lock of the driver.
ORPHANS_S = 10.0  # A look at the files that all processes have open may take 0.1 s.

_KINDS: dict[str, Callable[..., Any]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}
_Families = dict[str, Any]  # each name of FAMILIES, with what prometheus_client makes of it


class Collector:
    """Gives prometheus_client the metrics of a view.

    Parameters
    ----------
    view : View
        What to look at.
    label_pid : bool
        Whether the series of processes have the label ``pid``.
    clock : callable
        Returns seconds.

    Attributes
    ----------
    asked : float
        When it was last asked for metrics, in seconds of the clock.
    problem : str or None
        What the last look could not read.
    """

    def __init__(self, view: View, *, label_pid: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._view, self._label_pid, self._clock = view, label_pid, clock
        self._lock = forks.new_lock()
        self._families: _Families = {}
        self._counters = Counters()
        self._looked = self._searched = float("-inf")
        self._left: int | None = None
        self.asked = clock()
        self.problem: str | None = None

    def describe(self) -> list[Metric]:
        """Return the metrics without series."""
        return list(self._make().values())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment, or of the last second."""
        with self._lock:
            self.asked = self._clock()
            if self.asked - self._looked >= LOOK_S:
                self._families = self._look()
                self._looked = self.asked
            families = self._families
        yield from families.values()

    def _make(self) -> _Families:
        extra = ("pid",) if self._label_pid else ()
        return {
            name: _KINDS[kind](name, text, labels=(*labels, *extra) if labels == PROCESS else labels)
            for name, (kind, labels, text) in FAMILIES.items()
        }

    def _look(self) -> _Families:
        families = self._make()
        try:
            with self._view.lock:
                matrix = self._view.look()
                arenas = self._counters.update(self._view.journals, matrix.time)
                problems = self._add_gpus(families, matrix)
            _add_arenas(families, arenas)
        except Exception as error:  # noqa: BLE001 - a scrape that fails says so, and prints nothing amid the screen
            families, problems = self._make(), [_explain(error)]
        self._add_counters(families)
        try:
            families["devguard_shm_orphan_bytes"].add_metric((), self._find_orphans())
        except OSError as error:
            problems.append(f"{shared_memory.FOLDER} cannot be read: {error.strerror}")
        self.problem = "; ".join(problems) or None
        families["devguard_scrape_success"].add_metric((), int(not problems))
        return families

    def _add_gpus(self, families: _Families, matrix: Matrix) -> list[str]:
        """Add the GPUs, and the processes on them; return what could not be read."""
        if self._view.driver == "failed":  # The processes' own numbers would look like less memory, on other GPUs.
            return [self._view.problem]
        for column in matrix.columns:
            if self._view.driver == "read" and column.used is not None and column.total is not None:
                labels = labels_of(column.uuid, column.label)
                families["devguard_gpu_memory_used_bytes"].add_metric(labels, column.used)
                families["devguard_gpu_memory_total_bytes"].add_metric(labels, column.total)
        gpus = {column.uuid: column.label for column in matrix.columns}
        memory: dict[Labels, int] = {}
        contexts: dict[Labels, int] = {}
        for row in matrix.rows:
            for uuid, cell in row.cells.items():
                if uuid not in gpus:  # the driver has lost it
                    continue
                labels = labels_of(uuid, gpus[uuid], row.name, row.owner or "", cell.verdict)
                labels += (str(row.pid),) if self._label_pid else ()
                contexts[labels] = contexts.get(labels, 0) + 1
                if cell.bytes is not None:
                    memory[labels] = memory.get(labels, 0) + cell.bytes
        _add(families["devguard_process_gpu_memory_bytes"], memory)
        _add(families["devguard_process_gpu_context"], contexts)
        problems = [f"GPU {column.label}: {column.problem}" for column in matrix.columns if column.problem]
        return [*problems, self._view.problem] if self._view.driver == "absent" else problems

    def _add_counters(self, families: _Families) -> None:
        for name, sums in self._counters.sums.items():
            _add(families[name], sums.totals)
        for labels, buckets, seconds in self._counters.releases():
            families["devguard_transport_release_seconds"].add_metric(labels, buckets, seconds)

    def _find_orphans(self) -> int:
        if self._left is None or self._clock() - self._searched >= ORPHANS_S:
            self._left = None
            self._left = sum(segment.size for segment in orphans.find().orphans)
            self._searched = self._clock()
        return self._left


def _explain(error: Exception) -> str:
    """Return the text of an error; with its type where that is a fault of devguard, of which the text says little."""
    return str(error) if isinstance(error, DevGuardError) else f"{type(error).__name__}: {error}"


def _add_arenas(families: _Families, found: Iterable[tuple[Labels, Arena]]) -> None:
    gauges: dict[str, dict[Labels, int]] = {}
    for labels, arena in found:
        for name, value in (
            ("in_use_bytes", arena.in_use),
            ("budget_bytes", arena.budget),
            ("peak_bytes", arena.peak),
            ("leases", arena.leases),
        ):
            sums = gauges.setdefault(f"devguard_transport_{name}", {})
            sums[labels] = sums.get(labels, 0) + value
    for name, sums in gauges.items():
        _add(families[name], sums)


def _add(family: Any, sums: dict[Labels, Any]) -> None:
    for labels, value in sums.items():
        family.add_metric(labels, value)
