"""Arenas of `devguard.transport` as the logs sample them: their values checked, and a number for each one.

The samples come from the logs of other processes, so a sample that has another form is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devguard.logs.values import as_number, as_text, as_time

__all__ = ["Arena", "Numbers", "read"]

MOST_BOUNDS = 64


@dataclass(frozen=True)
class Arena:
    """One arena at one moment.

    Attributes
    ----------
    kind, address : str
        Where its bytes lie, ``"cpu"``; and its address, which no other arena has.
    in_use, budget, peak, leases : int
        As in `devguard.transport.Usage`, and the number of leases.
    put_bytes, deaths, cancelled : int
        As there.
    wait_seconds : float
        As there.
    waiting : int
        The number of puts that wait now.
    waiting_since : float
        The mean of the times at which they began, in seconds since 1970.
    bounds : tuple of float
        Upper bounds, in seconds, of the time from a put to its last acknowledgement.
    counts : tuple of int
        How many leases took at most as long as each bound; the last number is all of them.
    release_seconds : float
        The sum of their times.
    """

    kind: str
    address: str
    in_use: int
    budget: int
    peak: int
    leases: int
    put_bytes: int
    deaths: int
    cancelled: int
    wait_seconds: float
    waiting: int
    waiting_since: float
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    release_seconds: float

    def waited(self, now: float) -> float:
        """Return how long puts have waited until `now`, in seconds, those that still wait included."""
        return self.wait_seconds + self.waiting * max(now - self.waiting_since, 0.0)


def read(sample: dict[str, Any]) -> Arena | None:
    """Return an arena as its process has sampled it (transport/usage.py); None if the sample has another form."""
    try:
        release, waiting = sample["release_seconds"], as_number(sample["waiting"])
        if len(release["bounds"]) > MOST_BOUNDS or len(release["counts"]) != len(release["bounds"]) + 1:
            return None
        bounds = tuple(as_time(bound) for bound in release["bounds"])
        counts = tuple(as_number(count) for count in release["counts"])
        if sorted(set(bounds)) != [*bounds] or sorted(counts) != [*counts]:
            return None
        return Arena(
            kind=as_text(sample["kind"]),
            address=as_text(sample["address"]),
            in_use=as_number(sample["in_use"]),
            budget=as_number(sample["budget"]),
            peak=as_number(sample["peak"]),
            leases=as_number(sample["leases"]),
            put_bytes=as_number(sample["put_bytes"]),
            deaths=as_number(sample["deaths"]),
            cancelled=as_number(sample["cancelled"]),
            wait_seconds=as_time(sample["wait_seconds"]),
            waiting=waiting,
            waiting_since=as_time(sample["waiting_since"]) if waiting else 0.0,
            bounds=bounds,
            counts=counts,
            release_seconds=as_time(release["sum"]),
        )
    except (KeyError, TypeError, AttributeError):
        return None


class Numbers:
    """Numbers of the arenas of one process, from 1: as many as it has had at once.

    The address of an arena would be a new label at each start of a program.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def update(self, addresses: Sequence[str]) -> None:
        """Number the arenas that there are now; the number of one that is closed is free again."""
        self._numbers = {address: self._numbers[address] for address in addresses if address in self._numbers}
        free = (number for number in range(1, len(addresses) + 1) if number not in {*self._numbers.values()})
        for address in addresses:
            if address not in self._numbers:
                self._numbers[address] = next(free)

    def __getitem__(self, address: str) -> int:
        return self._numbers[address]
