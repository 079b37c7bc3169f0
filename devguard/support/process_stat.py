"""What the kernel says of a process or a thread, in the file ``stat`` of its folder in /proc."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ENDED", "PARENT", "read_fields", "STARTED", "STATE"]

# Positions in the result of `read_fields`: fields 3, 4 and 22 of proc_pid_stat(5).
STATE = 0  # one letter
PARENT = 1
STARTED = 19  # clock ticks since the machine started

ENDED = ("Z", "X")  # the states of a process that has ended and waits to be collected


def read_fields(place: Path) -> list[str]:
    """Return the fields after the name of the command, which may hold spaces and brackets.

    Parameters
    ----------
    place : Path
        The folder of the process or thread, such as ``/proc/1``.

    Raises
    ------
    FileNotFoundError, ProcessLookupError
        There is no such process any more.
    OSError
        The file cannot be read.
    """
    return (place / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
