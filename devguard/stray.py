"""The record of one stray, what the journal tells of a call site, and the row that it is made from.

It is plain data. Who counts strays, and keeps them within bounds, is journal.py; what becomes of one, verdict.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

from devguard.callsite import Frame, Site

__all__ = ["LEFT", "Action", "Key", "Row", "Stray", "format_row"]

Action = Literal["observed", "warned", "repaired", "placed", "refused", "kept"]

# what a stray is called that a door leaves where it is
LEFT: dict[str, Action] = {"observe": "observed", "warn": "warned"}


@dataclass(frozen=True, slots=True)
class Stray:
    """Work that landed, or was about to land, on a device that is not the owner's; one record per call site.

    Attributes
    ----------
    door : str
        The way it came, such as ``"load"``.
    source : str
        The device that it named or was on, such as ``"cuda:0"``.
    target : str
        The device on which it is now. Equal to `source` unless the action is ``"repaired"`` or ``"placed"``.
    owner : str
        Who owns this scope: ``"cuda:1"`` or ``"cpu"``.
    action : str
        ``"repaired"``, ``"observed"``, ``"warned"``, ``"refused"`` (an error was raised instead), or ``"kept"``
        (left alone, because the program said so explicitly). ``"placed"`` is a thread, or a task of a pool, that was
        started on the owner's device: whether it would have strayed, nobody can know.
    count : int
        How often it happened at this call site.
    bytes : int
        Bytes of tensor data, summed over `count`.
    dtype : str or None
        The data type of the first one, where the door knows it.
    shape : tuple of int or None
        The shape of the first one, where the door knows it.
    pid, thread, rank : int, str, str or None
        Who did it first. `rank` is the launcher's ``RANK``.
    time : float
        When it happened first, in seconds since the epoch.
    site : Site or None
        The line of the user's code; None where the whole stack belongs to libraries.
    via : str or None
        The transport by which it came, such as ``"zmq"``.
    note : str or None
        What else the door knows, in words.
    stack : tuple of Site
        The innermost lines of the first one's stack, innermost first.
    """

    door: str
    source: str
    target: str
    owner: str
    action: Action
    count: int
    bytes: int
    dtype: str | None
    shape: tuple[int, ...] | None
    pid: int
    thread: str
    rank: str | None
    time: float
    site: Site | None
    via: str | None
    note: str | None
    stack: tuple[Site, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"at {self.site}" if self.site else "at no line of user code"
        via = f" (via {self.via})" if self.via else ""
        moved = f"{self.source} -> {self.target}" if self.source != self.target else self.source
        how = f"[owner {self.owner}, {self.action}] {self.count} x, {self.bytes} bytes"
        note = f"; {self.note}" if self.note else ""
        return f"{self.door}: {moved} {how}, {where}{via}{note}"


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
