"""All processes of a run over time, and the moments of it that a report shows.

A process begins with its first line. It ends with its last one if that end was orderly. Else it counts as it last wrote
until the other processes of its time have written for the last time, because a killed process cannot write its end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from devguard.watch import matrix
from devguard.watch.cells import FAULTS, Cell
from devguard.watch.folder import ProcessLog
from devguard.watch.matrix import Column
from devguard.watch.report.track import Track

__all__ = ["History", "Moment", "Peak"]

STARTS_S = 60.0  # within which one parent starts the processes of a run


@dataclass(frozen=True)
class Peak:
    """The most bytes that were held on a GPU, and the first moment at which they were."""

    bytes: int
    time: float


@dataclass(frozen=True, order=True)
class Moment:
    """How bad a moment is: moments compare by these numbers in their order, and not by the time.

    Attributes
    ----------
    bytes : int
        What processes hold on GPUs that are not their own.
    places : int
        The number of processes and GPUs on which they hold it, or only a context.
    held : int
        What all processes hold.
    cells : int
        The number of processes and GPUs on which something is held.
    time : float
        In seconds since 1970.
    """

    bytes: int = -1
    places: int = -1
    held: int = -1
    cells: int = -1
    time: float = field(default=0.0, compare=False)


@dataclass
class _Part:
    """One part of the time, and the moments that stand for it."""

    worst: Moment = field(default_factory=Moment)
    peaks: dict[str, Peak] = field(default_factory=dict)  # by GPU


def _is_of_one_run(track: Track, other: Track) -> bool:
    """Return whether another process began while this one wrote, or was started with it.

    Not so a process of a later run in the same folder. What holds its memory writes nothing, so this process may have
    written its last line before the others had begun.
    """
    ours, theirs = track.journal.process, other.journal.process
    is_sibling = 0 < ours.parent == theirs.parent and ours.pid_space == theirs.pid_space
    return other.start <= track.last or (is_sibling and abs(other.start - track.start) <= STARTS_S)


class History:
    """All processes of a run over time.

    Parameters
    ----------
    journals : sequence of ProcessLog
        Their logs.
    ends : mapping of int to float
        When processes ended that did not write it: by their places in `journals`.
    most : int
        The most moments to keep. A longer history is cut into as many equal parts of the time. Each is kept as its
        worst moment, and for the drawing of a GPU as the moment at which most was held there.

    Attributes
    ----------
    tracks : list of Track
        One for each journal.
    columns : tuple of Column
        The GPUs.
    first, last : float
        The bounds of the time, in seconds since 1970.
    count : int
        The number of moments at which what a process held may have changed.
    worst : Moment
        The worst one.
    peaks : dict of str to Peak
        By GPU.
    misplaced : dict of (int, str) to int
        For the places in `tracks` and the GPUs of processes that were on a GPU that is not their own: the most bytes.
    """

    def __init__(self, journals: Sequence[ProcessLog], ends: Mapping[int, float], most: int) -> None:
        self.tracks = [Track(journal) for journal in journals]
        for place, track in enumerate(self.tracks):
            if track.end is None and not track.journal.is_running():
                rest = (other.last for other in self.tracks if _is_of_one_run(track, other))
                track.end = max(track.last, ends.get(place, max(rest)))
        self.columns: tuple[Column, ...] = tuple(matrix.find_columns(journals, None))
        self.first = min((track.start for track in self.tracks), default=0.0)
        self.last = max((track.last for track in self.tracks), default=0.0)
        self.count = sum(1 for _ in groupby(heapq.merge(*(self._times(track) for track in self.tracks))))
        self.worst = Moment()
        self.peaks: dict[str, Peak] = {}
        self.misplaced: dict[tuple[int, str], int] = {}
        self._most = most
        self._is_thinned = self.count > most
        self._parts: list[_Part] = []
        self._sweep()

    def moments(self, most: int) -> list[float]:
        """Return at most that many moments, in order; the worst is among them."""
        return sorted({max(part.worst for part in group).time for group in self._groups(most)})

    def points(self, uuid: str, most: int) -> list[float]:
        """Return at most that many moments, in order, to draw the memory of one GPU; its peak is among them."""
        found = set()
        for group in self._groups(most):
            peaks = [part.peaks[uuid] for part in group if uuid in part.peaks]
            best = max(peaks, key=lambda peak: peak.bytes, default=None)
            found.add(group[0].worst.time if best is None else best.time)
        return sorted(found)

    def _groups(self, most: int) -> list[list[_Part]]:
        """Return the parts of the time in groups, of which each is shown as one moment."""
        length = max(-(-len(self._parts) // most), 1)
        return [self._parts[start : start + length] for start in range(0, len(self._parts), length)]

    def _times(self, track: Track) -> Iterator[float]:
        """Yield the moments of one process, without its end if that is the end of all."""
        return (time for time in track.times() if time <= self.last)

    def _steps(self, place: int) -> Iterator[tuple[float, int]]:
        return ((time, place) for time in self._times(self.tracks[place]))

    def _starts(self) -> Iterator[tuple[float, int]]:
        """Yield the beginning of each part, at which what was held before still is."""
        length = (self.last - self.first) / self._most
        return ((self.first + length * part, -1) for part in range(self._most)) if self._is_thinned else iter(())

    def _sweep(self) -> None:
        """Go through the time once: find the worst moment and the peaks, of all of it and of each part."""
        now: list[dict[str, Cell]] = [{} for _ in self.tracks]
        held: dict[str, int] = {}
        nbytes = places = total = count = 0
        steps = heapq.merge(self._starts(), *(self._steps(place) for place in range(len(self.tracks))))
        for time, group in groupby(steps, key=itemgetter(0)):
            changed: set[str] = set()
            begins = not self._is_thinned or not self._parts
            for _, place in group:
                if place < 0:
                    begins = True
                    continue
                for sign, cells in ((-1, now[place]), (1, self.tracks[place].cells(time))):
                    changed.update(cells)
                    for uuid, cell in cells.items():
                        size = sign * (cell.bytes or 0)
                        held[uuid] = held.get(uuid, 0) + size
                        total, count = total + size, count + sign
                        if cell.verdict in FAULTS:
                            nbytes, places = nbytes + size, places + sign
                            if size > self.misplaced.get((place, uuid), -1):
                                self.misplaced[place, uuid] = size
                now[place] = cells
            if begins:
                self._parts.append(_Part())
                changed.update(held)
            self._note(Moment(nbytes, places, total, count, time), {uuid: held[uuid] for uuid in changed})

    def _note(self, moment: Moment, held: Mapping[str, int]) -> None:
        """Take the moment into the last part and into the whole, with what is held on each GPU where that changed."""
        part = self._parts[-1]
        if moment > part.worst:
            part.worst = moment
            self.worst = max(self.worst, moment)
        for uuid, size in held.items():
            for peaks in (part.peaks, self.peaks):
                if uuid not in peaks or size > peaks[uuid].bytes:
                    peaks[uuid] = Peak(size, moment.time)
