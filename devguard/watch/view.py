"""Look after look at the same processes and GPUs: for the screen, for ``--once`` and for metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from devguard.errors import ConfigError, SimulationError
from devguard.support import forks
from devguard.watch import gpus, matrix, neighbours
from devguard.watch.folder import Folder, ProcessLog, touch
from devguard.watch.gpus import Gpu, Source

__all__ = ["View"]


class View:
    """What a watcher sees of one run, or of the whole machine.

    Parameters
    ----------
    folder : Path, optional
        The log folder of the run. Without one, only the driver's view is shown.
    pids : sequence of int
        Show only these processes.

    Attributes
    ----------
    lock : RLock
        Held while it looks. Hold it to read `journals`, which the next look changes.
    journals : tuple of ProcessLog
        The logs that the last look has read, those of ended processes too.
    driver : str
        Whether the last look has read the GPUs: ``"read"``, ``"absent"`` (there is no driver) or ``"failed"``.
    problem : str
        Why it has not; empty if it has.

    Raises
    ------
    ConfigError
        If there is neither a folder nor a driver to read.
    """

    def __init__(self, folder: Path | None, pids: Sequence[int] = ()) -> None:
        self._folder = None if folder is None else Folder(folder)
        self._pids = frozenset(pids)
        self._source: Source | None = None
        self._simulations: frozenset[str] | None = None
        self._why_absent = ""
        self.lock = forks.new_lock()
        self.journals: tuple[ProcessLog, ...] = ()
        self.driver: Literal["read", "absent", "failed"] = "absent"
        self.problem = ""
        if folder is None:
            try:
                self._source = gpus.find()
            except ConfigError as error:
                raise ConfigError(
                    f"{error} Or name a log folder, which needs no driver: devguard watch DIR shows what its processes "
                    "report of themselves."
                ) from None

    def touch(self) -> bool:
        """Let the processes report their memory for the next seconds; return whether that is possible."""
        return self._folder is None or touch(self._folder.path)

    def look(self, ended_since: float | None = None) -> matrix.Matrix:
        """Return the matrix of this moment.

        Parameters
        ----------
        ended_since : float, optional
            Show also the processes that have ended, as they then were, if their logs began after this time, in seconds
            since 1970.
        """
        with self.lock:
            return self._look(ended_since)

    def _look(self, ended_since: float | None) -> matrix.Matrix:
        notes: list[str] = []
        journals: list[ProcessLog] = []
        if self._folder is not None:
            if not self.touch():
                notes.append(f"{self._folder.path} cannot be written, so the processes do not report their memory")
            for journal in self._folder.journals:
                del journal.samples[:-1]  # A watcher may run for weeks.
            journals = self._folder.update()
            self._find_containers(journals)
        seen = self._read_gpus(journals, notes)
        if self._pids:
            journals = [journal for journal in journals if journal.pid in self._pids]
            seen = seen and [_only(gpu, self._pids) for gpu in seen]
        damaged = [place for journal in journals for place in journal.damage.places()]
        if damaged:
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            notes.append(f"cannot be read: {damaged[0]}{more}")
        self.journals = tuple(journals)
        for journal in journals:
            notes += [f"pid {journal.process.pid}: {alert}" for alert in journal.process.alerts]
        if ended_since is not None:
            journals = [each for each in journals if each.is_running() or each.process.time >= ended_since]
        return matrix.build(journals, seen, keep_ended=ended_since is not None, notes=notes)

    def awaits_samples(self, since: float) -> bool:
        """Return whether a process that can report its memory has not done so since a time."""
        journals = [] if self._folder is None else self._folder.journals
        return any(
            journal.process.gpus and journal.is_running() and not (journal.sample and journal.sample.time >= since)
            for journal in journals
        )

    def _find_containers(self, journals: Sequence[ProcessLog]) -> None:
        """Find the processes of containers, which have other numbers here."""
        lost = [journal for journal in journals if journal.pid is None and not journal.process.ended]
        if not lost:
            return
        inner = neighbours.inner_pids()
        for journal in lost:
            found = [pid for pid, inside in inner.items() if inside == journal.process.pid and journal.is_process(pid)]
            journal.local_pid = found[0] if len(found) == 1 else None

    def _read_gpus(self, journals: Sequence[ProcessLog], notes: list[str]) -> list[Gpu] | None:
        """Return the driver's view; None, with a note, if there is none."""
        simulations = _find_simulations(journals)
        if self._folder is not None and simulations != self._simulations:
            self._simulations, self._why_absent = simulations, ""
            try:
                self._source = gpus.find(simulations)
            except ConfigError as error:
                self._source, self._why_absent = None, str(error)
        self.driver, self.problem = "absent" if self._source is None else "failed", self._why_absent
        if self._source is None:
            notes.append(f"only what the processes report of themselves: {self._why_absent}")
            return None
        try:
            seen = self._source.read()
        except (ConfigError, SimulationError) as error:
            if self._folder is None:
                raise
            has_ended = isinstance(error, SimulationError) and not any(journal.is_running() for journal in journals)
            self.problem = "the program has ended, and its simulated GPUs with it" if has_ended else str(error)
            notes.append(self.problem)
            return None
        self.driver = "read"
        notes += [f"GPU {gpu.label} cannot be read: {gpu.problem}" for gpu in seen if gpu.problem]
        if self._source.name == "NVML" and neighbours.is_inside_container():
            if any(gpu.processes for gpu in seen):
                notes.append("NVML names processes by their numbers on the host, which mean nothing in this container")
            seen = [dataclasses.replace(gpu, processes={}) for gpu in seen]
        return seen


def _find_simulations(journals: Sequence[ProcessLog]) -> frozenset[str]:
    """Return the simulations of the processes that run; if none runs, that of the newest one.

    A folder keeps the logs of earlier programs, the simulations of which are gone.
    """
    chosen = [journal for journal in journals if journal.is_running()] or journals[-1:]
    return frozenset(journal.process.simulation for journal in chosen if journal.process.simulation)


def _only(gpu: Gpu, pids: frozenset[int]) -> Gpu:
    return dataclasses.replace(gpu, processes={pid: held for pid, held in gpu.processes.items() if pid in pids})
