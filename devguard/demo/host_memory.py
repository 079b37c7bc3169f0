"""Sample the host memory of processes while they work, from a process of its own; it needs no torch.

Counted are the private pages of each process (``RssAnon``), not the pages that it shares: on simulated GPUs those hold
the memory of the devices. What lies in /dev/shm is counted for the whole machine. A peak between two samples is missed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

__all__ = ["Sampler", "private_bytes", "shared_bytes"]

PERIOD = 0.002  # seconds between two samples
_PRIVATE = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


def private_bytes(pids: Sequence[int]) -> int:
    """Return the bytes of private memory that living processes hold together."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found = _PRIVATE.search(Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace"))
            total += int(found[1]) << 10 if found else 0
    return total


def shared_bytes(folder: str = "/dev/shm") -> int:
    """Return the bytes that are used in /dev/shm, 0 if there is none."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return (found.f_blocks - found.f_bfree) * found.f_frsize


class Sampler:
    """A context manager that samples while its block runs.

    Parameters
    ----------
    pids : sequence of int
        The processes.

    Attributes
    ----------
    private, shared : int
        After the block: by how many bytes the private memory of all processes together, and /dev/shm, have grown at
        most.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)
        self.private = self.shared = 0

    def __enter__(self) -> Sampler:
        spawn = multiprocessing.get_context("spawn")
        self._link, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_sample, args=(theirs, self._pids), name="sampler", daemon=True)
        self._process.start()
        theirs.close()
        self._link.recv()  # the first sample is taken
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, EOFError):  # the sampler was killed
            self._link.send("stop")
            self.private, self.shared = self._link.recv()
        self._link.close()
        self._process.join()


def _sample(link: Connection, pids: Sequence[int]) -> None:
    """Sample until a message arrives, and answer with the largest growths."""
    private, shared = private_bytes(pids), shared_bytes()
    most_private, most_shared = private, shared
    link.send("ready")
    while not link.poll(PERIOD):
        most_private = max(most_private, private_bytes(pids))
        most_shared = max(most_shared, shared_bytes())
    link.recv()
    link.send((most_private - private, most_shared - shared))
