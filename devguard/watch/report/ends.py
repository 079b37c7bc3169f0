"""When the processes of a run ended that could not write it themselves, as other processes of the run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from devguard.watch.folder import ProcessLog

__all__ = ["find_ends"]


def find_ends(journals: Sequence[ProcessLog]) -> dict[int, float]:
    """Return the ends that are known, in seconds since 1970, by the places of the processes in `journals`.

    Parameters
    ----------
    journals : sequence of ProcessLog
        In the order of time.
    """
    lives: dict[tuple[str, str, int], list[int]] = {}  # the places of the processes with one process ID
    for place, journal in enumerate(journals):
        process = journal.process
        lives.setdefault((process.host, process.pid_space, process.pid), []).append(place)
    ends: dict[int, float] = {}
    for same in lives.values():
        for place, later in pairwise(same):  # It became another program, or its number was free.
            ends[place] = journals[later].process.time
    for journal in journals:
        parent = journal.process
        for child in parent.children:
            same = lives.get((parent.host, parent.pid_space, child.pid), [])
            begun = [place for place in same if journals[place].process.time <= child.time]
            if begun:
                ends[begun[-1]] = min(child.time, ends.get(begun[-1], child.time))
    return ends
