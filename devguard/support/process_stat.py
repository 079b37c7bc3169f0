"""What the kernel says of a process or a thread, in the file ``stat`` of its folder in /proc."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["ENDED", "PARENT", "read_fields", "STARTED", "STATE"]

# Positions in the result of `read_fields`: fields 3, 4 and 22 of proc_pid_stat(5).
STATE = 0  # one letter
PARENT = 1
STARTED = 19  # clock ticks since the machine started

LONGEST = 1 << 12  # bytes
ENDED = ("Z", "X")  # the states of a process that has ended and waits to be collected


def read_fields(place: Path | str) -> list[str]:
    """Return the fields after the name of the command, which may hold spaces and brackets.

    Parameters
    ----------
    place : Path or str
        The folder of the process or thread, such as ``/proc/1``.

    Raises
    ------
    FileNotFoundError, ProcessLookupError
        There is no such process any more.
    OSError
        The file cannot be read.
    """
    descriptor = os.open(f"{place}/stat", os.O_RDONLY | os.O_CLOEXEC)  # a watcher reads hundreds of them a second
    try:
        return os.read(descriptor, LONGEST).rpartition(b")")[2].decode("ascii", "replace").split()
    finally:
        os.close(descriptor)
