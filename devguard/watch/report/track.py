"""What one process held on each GPU over time, by its log."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from devguard.watch.cells import Cell, judge_cells
from devguard.watch.folder import ProcessLog, Sample, State

__all__ = ["Track"]

_BEFORE = State(0.0, None, (), (), ())  # what is known of a process before its first state


class Track:
    """One process over time. It counts as it last wrote.

    Parameters
    ----------
    journal : ProcessLog
        Its log.

    Attributes
    ----------
    start, last : float
        The times of its first and its last line, in seconds since 1970.
    end : float or None
        When it ended; None if it had not. Set by `History`, because a killed process cannot write its end.
    """

    def __init__(self, journal: ProcessLog) -> None:
        self.journal = journal
        self._samples = sorted(journal.samples, key=attrgetter("time"))
        self._states = sorted(journal.states, key=attrgetter("time"))
        self._sampled = [sample.time for sample in self._samples]
        self._changed = [state.time for state in self._states]
        known = [*self._sampled[:1], *self._changed[:1], *(time for time in journal.times.values() if time)]
        self.start = journal.process.time or min(known, default=0.0)
        self.last = max([self.start, *self._sampled[-1:], *self._changed[-1:], *journal.times.values()])
        self.end = self._changed[-1] if journal.process.ended and self._changed else None
        self._tags = {uuid: tag for tag, uuid in journal.process.gpus.items()}
        self._judged: dict[Any, list[tuple[str, str, Cell]]] = {}

    @property
    def states(self) -> list[State]:
        """Its states, in the order of time."""
        return self._states

    @property
    def samples(self) -> list[Sample]:
        """Its samples, in the order of time."""
        return self._samples

    def times(self) -> Iterator[float]:
        """Yield, in order, each moment at which what the process held may have changed."""
        yield self.start
        for time in heapq.merge(self._sampled, self._changed):
            if self.start < time and (self.end is None or time <= self.end):
                yield time
        if self.end is not None:
            yield math.nextafter(self.end, math.inf)  # In its last line the process still holds all of it.

    def is_alive(self, time: float) -> bool:
        """Return whether the process had begun, and is not known to have ended."""
        return self.start <= time and (self.end is None or time <= self.end)

    def state(self, time: float) -> State:
        """Return its owners and contexts at a moment."""
        place = bisect_right(self._changed, time)
        return self._states[place - 1] if place else _BEFORE

    def sample(self, time: float) -> Sample | None:
        """Return its last sample at a moment."""
        place = bisect_right(self._sampled, time)
        return self._samples[place - 1] if place else None

    def cells(self, time: float) -> dict[str, Cell]:
        """Return what the process held at a moment, by GPU."""
        if not self.is_alive(time):
            return {}
        state, sample = self.state(time), self.sample(time)
        memory = sample.memory if sample else {}
        # Samples with memory on the same devices have the same verdicts: to judge each costs seconds for a long run.
        key = id(state), sample is None, tuple((tag, held[1] > 0) for tag, held in memory.items())
        judged = self._judged.get(key)
        if judged is None:
            cells = judge_cells(self.journal, state, sample)
            judged = [(uuid, self._tags.get(uuid, uuid), cell) for uuid, cell in cells.items()]
            self._judged[key] = judged
        return {
            uuid: Cell(cell.verdict, memory[tag][1], False) if tag in memory else cell for uuid, tag, cell in judged
        }
