"""Faults that are planted into the ledger of a sender process, to prove that the chaos finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from devguard.transport.ledger import Ledger


def _reuse() -> None:
    """Let the bytes of a lease hold the next payload after its first acknowledgement, while others read."""
    acknowledge = Ledger.acknowledge

    def early(self: Any, reader: int, number: int, now: float) -> None:
        acknowledge(self, reader, number, now)
        lease = self.leases.get(number)
        if lease is not None and lease.segment is not None:
            lease.segment.give_back(lease.offset, lease.nbytes)
            self.in_use -= lease.nbytes
            lease.segment, lease.nbytes = None, 0
            self._admit(now)

    Ledger.acknowledge = early  # type: ignore[method-assign]


def _survive() -> None:
    """Let the parts of a dead reader stay."""
    Ledger.leave = lambda *_: None  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    "reuse-before-the-last-ack": _reuse,
    "lease-survives-its-reader": _survive,
}


def apply(name: str | None) -> None:
    """Plant a fault into this process."""
    if name is not None:
        MUTANTS[name]()
