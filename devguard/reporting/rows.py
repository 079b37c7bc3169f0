"""The rows of the journal: one per call site, with its count and a stack that is formatted when the row is read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Set

from devguard.reporting.stray import Action, Occurrence, Stray
from devguard.support import callsite
from devguard.support.callsite import Frame, Site

__all__ = ["format_row", "Key", "ROOM", "Row", "Tally"]

# code object and line of the call site, door, source, target, owner, action
Key = tuple[int, int, str, str, str, str, Action]


class Tally:
    """A part of a row's count. Only one thread adds to it, or only code that holds the journal's lock."""

    __slots__ = ("bytes", "count")

    def __init__(self, count: int = 0, nbytes: int = 0) -> None:
        self.count = count
        self.bytes = nbytes


ROOM = 64  # the most tallies of a row before those of ended threads are folded


class Row:
    """The mutable twin of `Stray`, with an unformatted stack.

    Attributes
    ----------
    own : Tally
        The tally that counts under the journal's lock.
    tallies : dict
        All tallies: `own` under the key 0, and those of threads under the identity of their stacks.
    """

    __slots__ = (
        "dtype", "key", "note", "own", "pid", "rank", "room", "shape", "site", "stack", "tallies", "thread", "time",
        "via",
    )  # fmt: skip

    def __init__(self, key: Key, occurrence: Occurrence, site: Frame | None, via: str | None) -> None:
        origin, start, shape = occurrence.origin, occurrence.start, occurrence.shape
        self.key = key
        self.own = Tally(1, occurrence.nbytes)
        self.tallies = {0: self.own}
        self.room = ROOM
        self.dtype = occurrence.dtype
        self.shape = None if shape is None else tuple(shape)
        self.pid = os.getpid()
        self.thread = threading.current_thread().name
        self.rank = os.environ.get("RANK")
        self.time = time.time()
        self.site = site
        self.via = via
        self.note = occurrence.note
        self.stack = origin.stack if origin is not None else () if start is None else callsite.stack_of(start)

    def total(self) -> tuple[int, int]:
        """Return the number of strays and their bytes. Needs the journal's lock."""
        count = nbytes = 0
        for tally in self.tallies.values():
            count, nbytes = count + tally.count, nbytes + tally.bytes
        return count, nbytes

    def fold(self, living: Set[int]) -> None:
        """Add the tallies of ended threads to `own`: those of stacks not in `living`. Needs the journal's lock."""
        for stack in self.tallies.keys() - living - {0}:
            tally = self.tallies.pop(stack)
            self.own.count += tally.count
            self.own.bytes += tally.bytes
        self.room = max(ROOM, 2 * len(self.tallies))


def format_row(key: Key, row: Row, count: int, total: int) -> Stray:
    """Return the record of `count` strays with `total` bytes at the call site of a row."""
    _, _, door, source, target, owner, action = key
    return Stray(
        door=door,
        source=source,
        target=target,
        owner=owner,
        action=action,
        count=count,
        bytes=total,
        dtype=row.dtype,
        shape=row.shape,
        pid=row.pid,
        thread=row.thread,
        rank=row.rank,
        time=row.time,
        site=None if row.site is None else Site.of(row.site),
        via=row.via,
        note=row.note,
        stack=tuple(map(Site.of, row.stack)),
    )
