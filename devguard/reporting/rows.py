"""The rows of the journal: one per call site, with its count, and the stack that is formatted when a row is read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Set
from typing import Any

from devguard.reporting.stray import Action, Stray
from devguard.support.callsite import Frame, Site

__all__ = ["format_row", "Key", "ROOM", "Row", "Tally"]

# code object and line of the call site, door, source, target, owner, action
Key = tuple[int, int, str, str, str, str, Action]


class Tally:
    """A part of a row's count. One thread alone adds to it, or whoever holds the journal's lock."""

    __slots__ = ("bytes", "count")

    def __init__(self, count: int = 0, nbytes: int = 0) -> None:
        self.count = count
        self.bytes = nbytes


ROOM = 64  # tallies that a row has at most before those of threads that are gone are folded


class Row:
    """The mutable twin of `Stray`, whose stack is not formatted.

    Attributes
    ----------
    own : Tally
        What is counted under the journal's lock.
    tallies : dict
        All tallies: that one, and those of threads by the identity of their stacks.
    """

    __slots__ = (
        "dtype", "key", "note", "own", "pid", "rank", "room", "shape", "site", "stack", "tallies", "thread", "time",
        "via",
    )  # fmt: skip

    def __init__(
        self,
        key: Key,
        site: Frame | None,
        via: str | None,
        stack: tuple[Frame, ...],
        nbytes: int,
        dtype: str | None,
        shape: Any,
    ) -> None:
        self.key = key
        self.own = Tally(1, nbytes)
        self.tallies = {0: self.own}
        self.room = ROOM
        self.dtype = dtype
        self.shape = None if shape is None else tuple(shape)
        self.pid = os.getpid()
        self.thread = threading.current_thread().name
        self.rank = os.environ.get("RANK")
        self.time = time.time()
        self.site = site
        self.via = via
        self.note: str | None = None
        self.stack = stack

    def total(self) -> tuple[int, int]:
        """Return how many strays there were, and how many bytes they had; under the journal's lock."""
        count = nbytes = 0
        for tally in self.tallies.values():
            count, nbytes = count + tally.count, nbytes + tally.bytes
        return count, nbytes

    def fold(self, living: Set[int]) -> None:
        """Count under the journal's lock what those threads have counted whose stacks are gone."""
        for stack in self.tallies.keys() - living - {0}:
            tally = self.tallies.pop(stack)
            self.own.count += tally.count
            self.own.bytes += tally.bytes
        self.room = max(ROOM, 2 * len(self.tallies))


def format_row(key: Key, row: Row, count: int, total: int) -> Stray:
    """Return the record of a row that counts `count` strays with `total` bytes."""
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
