"""What an arena has counted since it was made. The books (ledger.py) add to it, and nothing is ever taken off."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BOUNDS", "Totals"]

# Upper bounds in seconds: a payload that travels in its handle takes 0.1 ms, a request that waits in a queue minutes.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class Totals:
    """The counters of one arena.

    Attributes
    ----------
    puts, put_bytes : int
        The puts that had a lease, and the bytes of their payloads.
    wait_seconds : float
        How long puts have waited for room, all together; those that still wait are not in it.
    deaths : int
        The readers that ended, or were replaced, while a lease waited for them.
    cancelled : int
        The leases that were cancelled.
    released : list of int
        The leases that their readers' acknowledgements have ended, by the seconds since the put: one number for each
        of `BOUNDS`, and one for those above.
    released_seconds : float
        The sum of these seconds.
    """

    puts: int = 0
    put_bytes: int = 0
    wait_seconds: float = 0.0
    deaths: int = 0
    cancelled: int = 0
    released: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    released_seconds: float = 0.0

    def note_release(self, seconds: float) -> None:
        """Count a lease that its last reader has acknowledged, `seconds` after the put."""
        self.released[bisect_left(BOUNDS, seconds)] += 1
        self.released_seconds += seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain data. The counts of `release_seconds` are cumulative: the last one is the number of leases."""
        count, counts = 0, []
        for number in self.released:
            count += number
            counts.append(count)
        return {
            "puts": self.puts,
            "put_bytes": self.put_bytes,
            "wait_seconds": round(self.wait_seconds, 6),
            "deaths": self.deaths,
            "cancelled": self.cancelled,
            "release_seconds": {"bounds": list(BOUNDS), "counts": counts, "sum": round(self.released_seconds, 6)},
        }
