"""How the processes of a log ended, from all journals together: a killed process cannot say so, its parent may.

An orderly end is the last line of a journal. Without one, the journal of the parent that collected the process may hold
a line for it. Otherwise the kernel is asked, if the processes ran in the pid namespace of this one, whether the process
still runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, Protocol

from devguard.support import process_identity

__all__ = ["ChildEnd", "describe", "End", "has_died", "Mortal", "settle"]

End = Literal["running", "ended", "killed", "exited", "replaced", "lost", "unknown"]


@dataclass(frozen=True)
class ChildEnd:
    """The end of a child process, as its parent saw it.

    Attributes
    ----------
    pid : int
        The child.
    signal : str or None
        The signal that killed it, such as ``"SIGKILL"``.
    code : int or None
        Its status otherwise.
    time : float
        When the parent collected it, in seconds since 1970.
    """

    pid: int
    signal: str | None
    code: int | None
    time: float


class Mortal(Protocol):
    """What this module reads of a process, and sets: `end`, `signal`, `code`, and `end_time` if its parent tells it."""

    pid: int
    host: str
    pid_space: str
    started: int
    time: float
    ended: bool
    children: list[ChildEnd]
    end: End
    signal: str | None
    code: int | None
    end_time: float | None


def settle(processes: Sequence[Mortal]) -> None:
    """Set how each process ended; may be repeated when the journals have grown."""
    lives: dict[tuple[str, str, int], list[Mortal]] = {}  # all processes with one pid, the oldest first
    for process in sorted(processes, key=attrgetter("time")):
        process.signal = process.code = process.end_time = None
        lives.setdefault((process.host, process.pid_space, process.pid), []).append(process)
    ends: dict[int, ChildEnd] = {}  # of a process, by its identity: the first one, because the pid is free from then on
    for parent in processes:
        for child in parent.children:
            same = lives.get((parent.host, parent.pid_space, child.pid), [])
            born = bisect_right(same, child.time, key=attrgetter("time"))
            if born:
                known = ends.setdefault(id(same[born - 1]), child)
                if child.time < known.time:
                    ends[id(same[born - 1])] = child
    here = process_identity.pid_space()
    for same in lives.values():
        newer = 0
        for process in reversed(same):
            end = ends.get(id(process))
            if end is not None:
                process.signal, process.code, process.end_time = end.signal, end.code, end.time
            process.end = _find_end(process, newer, here)
            newer = process.started


def _find_end(process: Mortal, newer: int, here: str) -> End:
    """Return how a process ended; `newer` is the start of the next process with its pid, `here` this pid space."""
    if process.ended:
        return "ended"
    if process.signal is not None:
        return "killed"
    if process.code is not None:
        return "exited"
    if process.started and process.started == newer:
        return "replaced"
    if not here or process.pid_space != here:
        return "unknown"
    return "running" if process_identity.is_running(process.pid, process.started) else "lost"


def has_died(process: Mortal) -> bool:
    """Return whether a process did not come to an orderly end, as far as the journals show."""
    return process.end in ("killed", "exited", "lost") or process.signal is not None


def describe(process: Mortal) -> str:
    """Return in words how a process ended."""
    if process.end == "ended" and process.signal is not None:
        return f"wrote its last line, then was killed by {process.signal}"
    if process.end == "ended" and process.code is not None:
        return f"ended with status {process.code}"
    return {
        "running": "running",
        "ended": "ended",
        "killed": f"killed by {process.signal}",
        "exited": f"left with status {process.code}, without a last line",
        "replaced": "became another program",
        "lost": "killed or crashed (no last line)",
        "unknown": "running, or killed (no last line, and it ran on another machine or in another container)",
    }[process.end]
