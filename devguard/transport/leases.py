"""What the books of an arena hold: segments, leases, requests, and what is to be done after a change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Effects", "Lease", "PAGE", "Readers", "round_up", "Segment", "Ticket"]

PAGE = 4096  # bytes: a lease starts at a page, so that a reader can map it alone

Readers = int | tuple[str, ...]  # how many readers, whichever they are; or the names of the readers


def round_up(nbytes: int) -> int:
    """Return the next multiple of `PAGE`."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(eq=False, slots=True)
class Segment:
    """Memory of one arena that readers map as a whole.

    Attributes
    ----------
    number : int
        Its name in messages, never used twice.
    nbytes : int
        Its size, a multiple of `PAGE`.
    free : list of (int, int)
        Offset and size of each free range, by offset, never adjacent.
    leases : int
        How many leases lie in it.
    retired : bool
        Whether it takes no new lease.
    idle_since : float
        When its last lease ended, in seconds of the arena's clock.
    """

    number: int
    nbytes: int
    free: list[tuple[int, int]]
    leases: int = 0
    retired: bool = False
    idle_since: float = 0.0

    def take(self, nbytes: int) -> int | None:
        """Take the smallest free range of at least `nbytes`; return its offset, None if there is none."""
        fitting = [(size, offset) for offset, size in self.free if size >= nbytes]
        if not fitting:
            return None
        size, offset = min(fitting)
        position = self.free.index((offset, size))
        rest = [] if size == nbytes else [(offset + nbytes, size - nbytes)]
        self.free[position : position + 1] = rest
        self.leases += 1
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """Make a range free again, and join it with its free neighbours."""
        self.leases -= 1
        ranges: list[tuple[int, int]] = []
        for start, size in sorted([*self.free, (offset, nbytes)]):
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
            else:
                ranges.append((start, size))
        self.free = ranges


@dataclass(eq=False, slots=True)
class Lease:
    """One payload that its readers have not finished.

    Attributes
    ----------
    number : int
        Its name in messages and in the index, never used twice, from 1.
    readers : int or tuple of str
        Its readers, as given.
    slot : int
        The index's word that holds `number` while the lease may be opened.
    segment : Segment or None
        Where its bytes lie; None if they travel in the handle.
    offset, nbytes : int
        Its range of the segment, in bytes; ``nbytes`` is a multiple of `PAGE`, or 0.
    site : object
        The line of the put; the ledger only keeps it.
    since : float
        When it was granted, in seconds of the arena's clock.
    missing : int
        How many acknowledgements are missing, if the readers are counted.
    awaited : set of str
        The names of the readers that have not finished, if they are named.
    inside : set of int
        The readers that are reading it now.
    asked : set of int
        The readers that have not confirmed its cancellation.
    cancelled : bool
        Whether the sender has cancelled it.
    """

    number: int
    readers: Readers
    slot: int
    segment: Segment | None
    offset: int
    nbytes: int
    site: Any
    since: float
    missing: int = 0
    awaited: set[str] = field(default_factory=set)
    inside: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    cancelled: bool = False

    def await_readers(self) -> None:
        """Wait for all readers from now on."""
        if isinstance(self.readers, int):
            self.missing = self.readers
        else:
            self.awaited = set(self.readers)

    @property
    def is_open(self) -> bool:
        """Whether a reader may still open it."""
        return not self.cancelled and bool(self.missing or self.awaited)


@dataclass(eq=False, slots=True)
class Ticket:
    """A request for a lease, which waits for its turn.

    Attributes
    ----------
    nbytes : int
        The bytes that it needs, a multiple of `PAGE`, or 0.
    readers : int or tuple of str
        Its readers, as given.
    site : object
        The line of the put.
    since : float
        When it was made, in seconds of the arena's clock.
    payload : int
        The bytes of the payload, for the totals.
    lease : Lease or None
        The lease, once it is granted.
    has_waited : bool
        Whether it found no room at once.
    reported : bool
        Whether the user was told that it waits.
    """

    nbytes: int
    readers: Readers
    site: Any
    since: float
    payload: int = 0
    lease: Lease | None = None
    has_waited: bool = False
    reported: bool = False


@dataclass(slots=True)
class Effects:
    """What the arena has to do after a call, in this order.

    Attributes
    ----------
    ended : list of Lease
        Leases to be removed from the index.
    closed : list of Segment
        Segments to close.
    made : list of Segment
        Segments to create.
    granted : list of Ticket
        Requests that have their lease.
    """

    ended: list[Lease] = field(default_factory=list)
    closed: list[Segment] = field(default_factory=list)
    made: list[Segment] = field(default_factory=list)
    granted: list[Ticket] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ended or self.closed or self.made or self.granted)
