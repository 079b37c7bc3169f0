"""Count the copies between the host and the GPUs that a pass makes, from the log of the simulation.

Each line of the log is one call of CUDA: process, thread, device, call, details. Other calls than copies are left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Copies", "read", "size"]

_COPY = re.compile(r"^\d+ \d+ \d+ memcpy\w* dst=(-?\d+) src=(-?\d+) bytes=(\d+)$", re.MULTILINE)


class Copies(NamedTuple):
    """The copies of a pass.

    Attributes
    ----------
    down : list of int
        The bytes of each copy from a GPU to the host.
    up : list of int
        The same, from the host to a GPU.
    across : list of int
        The same, within the GPUs.
    """

    down: list[int]
    up: list[int]
    across: list[int]


def size(log: str | os.PathLike[str]) -> int:
    """Return the size of a log in bytes, which is where the next call will stand; 0 if there is no log yet."""
    path = Path(log)
    return path.stat().st_size if path.exists() else 0


def read(log: str | os.PathLike[str], start: int = 0, end: int | None = None) -> Copies:
    """Return the copies between two positions of a log.

    Parameters
    ----------
    log : path
        The file that DEVGUARD_SIM_LOG names.
    start, end : int
        Positions from `size`, in bytes; by default the whole log.
    """
    copies = Copies([], [], [])
    text = Path(log).read_bytes()[start:end].decode(errors="replace") if Path(log).exists() else ""
    for target, source, count in _COPY.findall(text):
        to_host, from_host = int(target) < 0, int(source) < 0
        if not (to_host and from_host):
            (copies.down if to_host else copies.up if from_host else copies.across).append(int(count))
    return copies
