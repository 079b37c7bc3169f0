"""The ledger of an arena: which bytes of its segments are under a lease, and which readers have not finished.

Pure bookkeeping: no thread, no lock, no clock, no memory. The arena holds a lock around each call, and then carries out
the effects: segments to create or to close, leases that were granted or that have ended.

A lease ends by acknowledgements, by deaths, or by a cancellation that each reader has confirmed. Only then may its
bytes hold another payload. When a reader dies, or seems to have died, the segments that it may still be reading are
retired: they take no new lease and are closed when their last one ends.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from devguard.transport.leases import Effects, Lease, Readers, Segment, Ticket, round_up
from devguard.transport.totals import Totals

__all__ = ["Ledger", "MAX_LEASES"]

SEGMENT = 64 << 20  # bytes of a segment, unless one payload needs more, or the budget has less
IDLE = 10.0  # seconds until an empty segment goes back to the system
MAX_LEASES = 1 << 16  # words in the index


class Ledger:
    """The books of one arena.

    Parameters
    ----------
    budget : int
        The most bytes of all segments, and so of all leases.
    segment : int
        The bytes of a segment, where the budget and the payload leave a choice.

    Attributes
    ----------
    totals : Totals
        What it has counted.
    """

    def __init__(self, budget: int, segment: int = SEGMENT) -> None:
        self.budget = budget
        self.leases: dict[int, Lease] = {}
        self.segments: dict[int, Segment] = {}
        self.names: dict[int, str | None] = {}  # by reader
        self.waiting: deque[Ticket] = deque()
        self.in_use = 0  # bytes under a lease
        self.peak = 0
        self.waits = 0  # requests that found no room at once
        self.totals = Totals()
        self._segment = round_up(segment)
        self._slots: list[int] = []  # free ones below `_used_slots`
        self._used_slots = 0
        self._next_lease = self._next_segment = 1
        self._effects = Effects()

    @property
    def size(self) -> int:
        """The bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments.values())

    def take_effects(self) -> Effects:
        """Return what the arena has to do since the last call."""
        effects = self._effects
        if effects:
            self._effects = Effects()
        return effects

    # Requests.

    def request(self, ticket: Ticket, now: float) -> None:
        """Queue a request; it has its lease at once if there is room and no other one waits."""
        self.waiting.append(ticket)
        self._admit(now)
        if ticket.lease is None:
            ticket.has_waited = True
            self.waits += 1

    def withdraw(self, ticket: Ticket, now: float) -> None:
        """Give up a request, if there is one, or end its lease, of which no reader knows."""
        if ticket.lease is not None:
            if ticket.lease.number in self.leases:
                self._end(ticket.lease, now)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
            self._end_wait(ticket, now)
        self._admit(now)

    def _end_wait(self, ticket: Ticket, now: float) -> None:
        if ticket.has_waited:
            self.totals.wait_seconds += now - ticket.since

    def _admit(self, now: float) -> None:
        """Grant requests in their order, as long as there is room."""
        while self.waiting and self._has_slot():
            ticket = self.waiting[0]
            place = self._find_room(ticket.nbytes) if ticket.nbytes else (None, 0)
            if place is None:
                return
            segment, offset = place
            ticket.lease = lease = self._make_lease(segment, offset, ticket.nbytes)
            self.publish(lease, ticket.readers, ticket.site, now, ticket.payload)
            self.in_use += lease.nbytes
            self.peak = max(self.peak, self.in_use)
            self.waiting.popleft()
            self._end_wait(ticket, now)
            self._effects.granted.append(ticket)

    def make_ahead(self, count: int) -> list[Lease]:
        """Return leases without bytes for later puts: they are not in the books before `publish`."""
        made: list[Lease] = []
        while len(made) < count and self._has_slot():
            made.append(self._make_lease(None, 0, 0))
        return made

    def _make_lease(self, segment: Segment | None, offset: int, nbytes: int) -> Lease:
        self._next_lease += 1
        return Lease(self._next_lease - 1, 0, self._take_slot(), segment, offset, nbytes, None, 0.0)

    def publish(self, lease: Lease, readers: Readers, site: Any, now: float, payload: int = 0) -> None:
        """Enter a lease of `payload` bytes; the readers of one that was made ahead may have opened it already."""
        lease.readers, lease.site, lease.since = readers, site, now
        lease.await_readers()
        self.leases[lease.number] = lease
        self.totals.puts += 1
        self.totals.put_bytes += payload

    def give_up(self, lease: Lease, now: float) -> None:
        """End a lease that was made ahead and of which no reader knows, whether or not it was published."""
        if lease.number in self.leases:
            self._end(lease, now)
        elif lease.site is None:  # otherwise it was published, and has ended
            self._effects.ended.append(lease)
            self._slots.append(lease.slot)
        self._admit(now)

    def _has_slot(self) -> bool:
        return bool(self._slots) or self._used_slots < MAX_LEASES

    def _take_slot(self) -> int:
        if self._slots:
            return self._slots.pop()
        self._used_slots += 1
        return self._used_slots - 1

    def _find_room(self, nbytes: int) -> tuple[Segment, int] | None:
        """Return the segment and the offset for a payload; None if it has to wait."""
        for segment in sorted(self.segments.values(), key=lambda one: (one.nbytes, -one.leases, one.number)):
            offset = None if segment.retired else segment.take(nbytes)
            if offset is not None:
                return segment, offset
        if nbytes > self.budget:  # alone, in a segment of its own
            if self.in_use:
                return None
            self._close_idle(0)
        else:
            self._close_idle(self.budget - nbytes)
        room = self.budget - self.size
        if nbytes > max(room, 0) and (nbytes <= self.budget or self.segments):
            return None
        size = max(nbytes, min(self._segment, room))
        segment = Segment(self._next_segment, size, [(0, size)], retired=nbytes > self.budget)
        self._next_segment += 1
        self.segments[segment.number] = segment
        self._effects.made.append(segment)
        offset = segment.take(nbytes)
        assert offset == 0
        return segment, 0

    # Readers.

    def join(self, reader: int, name: str | None) -> int | None:
        """Add a reader; return the one that had its name, which has to `leave`."""
        former = None if name is None else next((known for known, other in self.names.items() if other == name), None)
        self.names[reader] = name
        return former

    def open(self, reader: int, number: int) -> None:
        """Note that a reader is reading a lease."""
        lease = self.leases.get(number)
        if lease is not None and reader in self.names:
            lease.inside.add(reader)

    def put_back(self, reader: int, number: int, now: float) -> None:
        """Note that a reader has stopped to read a lease before it had it: it may open it again."""
        lease = self.leases.get(number)
        if lease is not None:
            lease.inside.discard(reader)
            self._settle(lease, now)

    def acknowledge(self, reader: int, number: int, now: float) -> None:
        """Note that a reader has finished a lease: it has its copy, or does not want one."""
        lease = self.leases.get(number)
        if lease is not None and reader in self.names:
            self._finish(lease, reader)
            if self._settle(lease, now) and not lease.cancelled:
                self.totals.note_release(now - lease.since)

    def leave(self, reader: int, now: float) -> None:
        """Note that a reader is dead, or seems so: its parts are over, and segments that it may read are retired."""
        name = self.names.pop(reader, None)
        touched = [
            lease
            for lease in self.leases.values()
            if reader in lease.inside or reader in lease.asked or (name is not None and name in lease.awaited)
        ]
        self.totals.deaths += bool(touched)
        for lease in touched:  # first, so that nothing is granted in a segment that the next one retires
            if lease.segment is not None:
                lease.segment.retired = True
        for lease in touched:
            self._finish(lease, reader, name)
            self._settle(lease, now)

    def cancel(self, number: int, now: float) -> list[int]:
        """Cancel a lease; return the readers that have to confirm that they do not read it."""
        lease = self.leases.get(number)
        if lease is None or lease.cancelled:
            return []
        lease.cancelled = True
        self.totals.cancelled += 1
        if lease.segment is None:
            lease.inside.clear()  # what travels in the handle takes no room
        else:
            lease.asked = {
                reader
                for reader, name in self.names.items()
                if reader not in lease.finished and (isinstance(lease.readers, int) or name in lease.awaited)
            }
        asked = sorted(lease.asked)
        self._settle(lease, now)
        return asked

    def confirm(self, reader: int, number: int, inside: bool, now: float) -> None:
        """Note a reader's answer to a cancellation: it does not read the lease, or will acknowledge it."""
        lease = self.leases.get(number)
        if lease is not None and reader in lease.asked:
            lease.asked.discard(reader)
            if inside:
                lease.inside.add(reader)
            self._settle(lease, now)

    def holders(self, lease: Lease) -> list[int]:
        """Return the readers that are known to hold a lease: they read it, or have to confirm its cancellation."""
        named = {reader for reader, name in self.names.items() if name in lease.awaited}
        return sorted(lease.inside | lease.asked | (set() if lease.cancelled else named))

    # Time.

    def expire(self, now: float) -> float | None:
        """Close the segments that have been empty for `IDLE` seconds; return the seconds until the next one is due."""
        empty = [segment for segment in self.segments.values() if not segment.leases]
        for segment in empty:
            if now - segment.idle_since >= IDLE:
                self._close(segment)
        return min(
            (IDLE - (now - segment.idle_since) for segment in empty if segment.number in self.segments), default=None
        )

    def end_all(self, now: float) -> None:
        """End all leases and close all segments: the arena closes."""
        for ticket in self.waiting:
            self._end_wait(ticket, now)
        self.waiting.clear()
        for lease in list(self.leases.values()):
            self._end(lease, now)
        for segment in list(self.segments.values()):
            self._close(segment)

    # The end of a lease and of a segment.

    def _finish(self, lease: Lease, reader: int, name: str | None = None) -> None:
        """Note that the part of a reader is over, once."""
        lease.inside.discard(reader)
        lease.asked.discard(reader)
        if reader in lease.finished:
            return
        lease.finished.add(reader)
        if isinstance(lease.readers, int):
            lease.missing = max(0, lease.missing - 1)
        else:
            lease.awaited.discard(name or self.names.get(reader) or "")

    def _settle(self, lease: Lease, now: float) -> bool:
        """End a lease for which no reader is left; return whether it has ended."""
        if lease.is_open or lease.inside or lease.asked or lease.number not in self.leases:
            return False
        self._end(lease, now)
        self._admit(now)
        return True

    def _end(self, lease: Lease, now: float) -> None:
        del self.leases[lease.number]
        self.in_use -= lease.nbytes
        self._slots.append(lease.slot)
        self._effects.ended.append(lease)
        segment = lease.segment
        if segment is not None:
            segment.give_back(lease.offset, lease.nbytes)
            segment.idle_since = now
            if segment.retired and not segment.leases:
                self._close(segment)

    def _close(self, segment: Segment) -> None:
        del self.segments[segment.number]
        self._effects.closed.append(segment)

    def _close_idle(self, most: int) -> None:
        """Close empty segments, the longest idle first, until all segments together have at most `most` bytes."""
        for segment in sorted(self.segments.values(), key=lambda one: one.idle_since):
            if self.size <= most:
                return
            if not segment.leases:
                self._close(segment)
