"""What an arena holds, and the readers that it waits for: as plain data, and in messages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devguard.errors import BudgetFull
from devguard.transport.leases import Lease, Ticket
from devguard.transport.ledger import MAX_LEASES, Ledger
from devguard.transport.wire import Channel, describe

__all__ = ["Account", "LeaseUsage", "Usage"]


@dataclass(frozen=True)
class LeaseUsage:
    """One lease of `Arena.usage`.

    Attributes
    ----------
    number : int
        The lease, as errors name it.
    nbytes : int
        Bytes of the budget that it holds, a multiple of 4096; 0 if the payload travels in the handle.
    age : float
        Seconds since the put.
    waits_for : tuple of str
        The readers that have not finished it: by name or process, or how many are still to come.
    cancelled : bool
        Whether it was cancelled; then it waits for readers to confirm that they do not read it.
    site : str
        The line of the put.
    """

    number: int
    nbytes: int
    age: float
    waits_for: tuple[str, ...]
    cancelled: bool
    site: str


@dataclass(frozen=True)
class Usage:
    """What an arena holds.

    Attributes
    ----------
    budget, in_use, peak : int
        Bytes: the most, those under a lease now, and the most that there were.
    allocated : int
        Bytes of all segments, which are kept for the next payloads and go back to the system after 10 idle seconds.
    waits : int
        How many puts had to wait for room.
    waiting : int
        How many wait now.
    readers : tuple of str
        The connected readers.
    leases : tuple of LeaseUsage
        All leases, the oldest first.
    puts, put_bytes : int
        The puts that had room so far, and the bytes of their payloads.
    wait_seconds : float
        How long puts have waited for room so far, all together; those that still wait are not in it.
    deaths : int
        The readers that ended, or were replaced, while a lease waited for them.
    cancelled : int
        The leases that were cancelled.
    """

    budget: int
    in_use: int
    peak: int
    allocated: int
    waits: int
    waiting: int
    readers: tuple[str, ...]
    leases: tuple[LeaseUsage, ...]
    puts: int
    put_bytes: int
    wait_seconds: float
    deaths: int
    cancelled: int


class Account:
    """Says what an arena holds, and which readers it waits for. The arena's lock is held around each call.

    Parameters
    ----------
    ledger : Ledger
        The arena's books.
    channels : dict
        The connections, by reader.
    """

    def __init__(self, ledger: Ledger, channels: Mapping[int, Channel]) -> None:
        self._ledger, self._channels = ledger, channels
        self._epoch = time.time() - time.monotonic()  # once, so that a time does not change from sample to sample

    def name(self, reader: int) -> str:
        """Return a reader, for a message."""
        channel, name = self._channels.get(reader), self._ledger.names.get(reader)
        process = describe(channel) if channel is not None else "a process that has ended"
        return f"{name} ({process})" if name else process

    def waits_for(self, lease: Lease) -> list[str]:
        """Return the readers for which a lease waits, for a message."""
        known = self._ledger.holders(lease)
        texts = [self.name(reader) for reader in known]
        if lease.cancelled:
            return texts
        joined = {self._ledger.names[reader] for reader in known}
        texts += [f"{name} (not connected)" for name in sorted(lease.awaited - joined)]
        others = lease.missing - len(lease.inside)
        if others > 0:
            texts.append(f"{others} of {lease.readers} readers that have not opened it")
        return texts

    def describe_leases(self) -> str:
        """Return the oldest lease that holds bytes, and the readers that it waits for, for a message."""
        leases = sorted((lease for lease in self._ledger.leases.values() if lease.nbytes), key=lambda one: one.since)
        if not leases:
            return "Other puts wait before this one." if self._ledger.waiting else ""
        oldest, now = leases[0], time.monotonic()
        readers = ", ".join(self.waits_for(oldest)) or "no reader"
        return (
            f"The oldest of {len(leases)}: lease {oldest.number}, {oldest.nbytes:,} bytes, {now - oldest.since:.0f} s, "
            f"put at {oldest.site}, waits for {readers}."
        )

    def full(self, ticket: Ticket, when: str) -> BudgetFull:
        """Return the error of a put that found no room."""
        ledger = self._ledger
        return BudgetFull(
            f"There is no room{when} for {ticket.nbytes:,} bytes: {ledger.in_use:,} of {ledger.budget:,} bytes are "
            f"under {len(ledger.leases):,} leases (at most {MAX_LEASES:,}), and puts are served in their order. "
            f"{self.describe_leases()} Put at {ticket.site}."
        )

    def usage(self) -> Usage:
        """Return what the arena holds now."""
        now, ledger, totals = time.monotonic(), self._ledger, self._ledger.totals
        return Usage(
            ledger.budget,
            ledger.in_use,
            ledger.peak,
            ledger.size,
            ledger.waits,
            len(ledger.waiting),
            tuple(self.name(reader) for reader in sorted(ledger.names)),
            tuple(
                LeaseUsage(
                    lease.number,
                    lease.nbytes,
                    now - lease.since,
                    tuple(self.waits_for(lease)),
                    lease.cancelled,
                    str(lease.site),
                )
                for lease in sorted(ledger.leases.values(), key=lambda lease: lease.since)
            ),
            totals.puts,
            totals.put_bytes,
            totals.wait_seconds,
            totals.deaths,
            totals.cancelled,
        )

    def sample(self) -> dict[str, Any]:
        """Return what the arena holds, and its totals, as plain data that is equal while nothing changes.

        `waiting_since` is the mean of the times at which the puts began that wait now. `oldest` is the oldest lease
        that holds bytes of the budget, or else the oldest one. Times are seconds since 1970.
        """
        ledger = self._ledger
        begun = [ticket.since for ticket in ledger.waiting]
        return {
            "budget": ledger.budget,
            "in_use": ledger.in_use,
            "peak": ledger.peak,
            "allocated": ledger.size,
            "leases": len(ledger.leases),
            "waiting": len(begun),
            "waiting_since": self._as_time(sum(begun) / len(begun)) if begun else None,
            "waits": ledger.waits,
            "oldest": self._describe_oldest(),
            **ledger.totals.as_dict(),
        }

    def _describe_oldest(self) -> dict[str, Any] | None:
        leases = self._ledger.leases.values()  # in the order of their puts
        oldest = next((lease for lease in leases if lease.nbytes), None) or next(iter(leases), None)
        if oldest is None:
            return None
        return {
            "put_at": self._as_time(oldest.since),
            "bytes": oldest.nbytes,
            "site": str(oldest.site),
            "waits_for": self.waits_for(oldest),
        }

    def _as_time(self, at: float) -> float:
        """Return a moment of the arena's clock in seconds since 1970."""
        return round(self._epoch + at, 3)
