"""The counters of all processes that a log folder knows, those that have ended too: their strays and their arenas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile

from devguard.reporting.actions import is_stray
from devguard.watch.folder import ProcessLog
from devguard.watch.matrix import name_of
from devguard.watch.metrics import arenas
from devguard.watch.metrics.arenas import Arena
from devguard.watch.metrics.families import FAMILIES, Labels, labels_of
from devguard.watch.metrics.sums import Sums

__all__ = ["Counters"]


class Counters:
    """What the processes of a log folder have counted, and what the arenas of those that run hold.

    Attributes
    ----------
    sums : dict of str to Sums
        Each counter of `FAMILIES`, without the histogram.
    """

    def __init__(self) -> None:
        self.sums = {name: Sums() for name, family in FAMILIES.items() if family.kind == "counter"}
        self._bounds: dict[Labels, tuple[float, ...]] = {}
        self._releases = Sums()
        self._release_seconds = Sums()
        self._numbers: dict[str, arenas.Numbers] = {}  # by the file of the process
        self._read_until: dict[str, float] = {}

    def update(self, journals: Iterable[ProcessLog], now: float) -> list[tuple[Labels, Arena]]:
        """Take what the logs say; return the arenas of the processes that run, with their labels."""
        found = []
        for journal in journals:
            self._take_strays(journal)
            found += self._take_arenas(journal, now if journal.is_running() else None)
        return found

    def _take_strays(self, journal: ProcessLog) -> None:
        for number, site in journal.rows.items():
            if is_stray(site.action):
                source = site.devices[0].partition(" -> ")[0]
                owner = site.owners[0] if site.owners else ""
                labels = labels_of(site.door, site.action, source, owner)
                key = journal.process.file, number
                self.sums["devguard_strays_total"].update(key, labels, site.count)
                self.sums["devguard_stray_bytes_total"].update(key, labels, site.bytes)

    def _take_arenas(self, journal: ProcessLog, now: float | None) -> list[tuple[Labels, Arena]]:
        """Take the samples since the last time; return the arenas of the newest one, if the process runs."""
        file, role, newest = journal.process.file, name_of(journal.process), journal.sample
        if newest is None:
            return []
        numbers = self._numbers.setdefault(file, arenas.Numbers())
        until, self._read_until[file] = self._read_until.get(file, 0.0), newest.time
        since = [*takewhile(lambda sample: sample.time > until, reversed(journal.samples))][::-1] or [newest]
        found: list[tuple[Labels, Arena]] = []
        for sample in since:
            known = [arena for arena in map(arenas.read, sample.arenas) if arena is not None]
            numbers.update([arena.address for arena in known])
            names = [role if numbers[arena.address] == 1 else f"{role} {numbers[arena.address]}" for arena in known]
            found = [(labels_of(name, arena.kind), arena) for name, arena in zip(names, known, strict=True)]
            for labels, arena in found:
                self._take_arena(labels, arena)
        if now is None:
            return []
        for labels, arena in found:
            self.sums["devguard_transport_wait_seconds_total"].update(arena.address, labels, arena.waited(now))
        return found

    def _take_arena(self, labels: Labels, arena: Arena) -> None:
        for name, total in (
            ("devguard_transport_put_bytes_total", arena.put_bytes),
            ("devguard_transport_wait_seconds_total", arena.wait_seconds),
            ("devguard_transport_peer_deaths_total", arena.deaths),
            ("devguard_transport_cancelled_total", arena.cancelled),
        ):
            self.sums[name].update(arena.address, labels, total)
        if self._bounds.setdefault(labels, arena.bounds) == arena.bounds:  # another release may have others
            for bound, count in zip(_texts(arena.bounds), arena.counts, strict=True):
                self._releases.update((arena.address, bound), (*labels, bound), count)
            self._release_seconds.update(arena.address, labels, arena.release_seconds)

    def releases(self) -> Iterator[tuple[Labels, list[tuple[str, float]], float]]:
        """Yield, for each arena, how many leases took at most as long as each bound, and the sum of their seconds."""
        for labels, seconds in self._release_seconds.totals.items():
            keys = [(*labels, bound) for bound in _texts(self._bounds[labels])]
            yield labels, [(key[-1], self._releases.totals[key]) for key in keys], seconds


def _texts(bounds: tuple[float, ...]) -> list[str]:
    return [*map(str, bounds), "+Inf"]
