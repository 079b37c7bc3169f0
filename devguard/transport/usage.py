"""What an arena holds, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LeaseUsage", "Usage"]


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
    """

    budget: int
    in_use: int
    peak: int
    allocated: int
    waits: int
    waiting: int
    readers: tuple[str, ...]
    leases: tuple[LeaseUsage, ...]
