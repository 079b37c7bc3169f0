"""The contexts of a run: when each one was first seen, and on which GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devguard.reporting.actions import LEFT_ALONE
from devguard.watch.cells import FAULTS, Verdict
from devguard.watch.folder import ProcessLog
from devguard.watch.report.track import Track

__all__ = ["Context", "find_contexts"]


@dataclass(frozen=True)
class Context:
    """One context.

    Attributes
    ----------
    place : int
        That of its process in the history.
    device : str
        As the process names it, such as ``"cuda:0"``.
    uuid : str
        The GPU.
    time : float
        When the log named it first, in seconds since 1970.
    verdict : str
        A key of `cells.VERDICTS`: the last one that is not ``"?"``, because a process may choose its GPU later.
    line : str
        The first line of code that is known to have put something there; empty if none is.
    """

    place: int
    device: str
    uuid: str
    time: float
    verdict: Verdict
    line: str

    @property
    def is_misplaced(self) -> bool:
        """Whether it is on a GPU that is not the process's own."""
        return self.verdict in FAULTS


def find_contexts(tracks: Sequence[Track]) -> list[Context]:
    """Return the contexts of all processes: those on GPUs of others first, then in the order of time."""
    found = []
    for place, track in enumerate(tracks):
        first: dict[str, float] = {}
        verdicts: dict[str, Verdict] = {}
        for state in track.states:
            for device in state.contexts:
                first.setdefault(device, state.time)
        for time in (*(state.time for state in track.states), track.last):
            for uuid, cell in track.cells(time).items():
                if cell.verdict != "?" or uuid not in verdicts:
                    verdicts[uuid] = cell.verdict
        for device, time in first.items():
            uuid = track.journal.process.gpus.get(device, device)
            line = _first_line(track.journal, device)
            found.append(Context(place, device, uuid, time, verdicts.get(uuid, "?"), line))
    return sorted(found, key=lambda context: (not context.is_misplaced, context.time, context.place))


def _first_line(journal: ProcessLog, device: str) -> str:
    """Return the first line that left something on a device, with its door."""
    there = [
        (journal.times.get(number, 0.0), f"{row.file}:{row.line} in {row.function} (door {row.door})")
        for number, row in journal.rows.items()
        if row.file and row.action in (*LEFT_ALONE, "kept") and device in row.devices
    ]
    return min(there)[1] if there else ""
