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
        In the order of time, after `devguard.logs.process_end.settle`, which sets the ends that parents have seen.
    """
    lives: dict[tuple[str, str, int], list[int]] = {}  # the places of the processes with one process ID
    for place, journal in enumerate(journals):
        process = journal.process
        lives.setdefault((process.host, process.pid_space, process.pid), []).append(place)
    seen = ((place, journal.process.end_time) for place, journal in enumerate(journals))
    ends = {place: time for place, time in seen if time is not None}
    for same in lives.values():
        for place, later in pairwise(same):  # It became another program, or its number was free.
            began = journals[later].process.time
            ends[place] = min(began, ends.get(place, began))
    return ends
