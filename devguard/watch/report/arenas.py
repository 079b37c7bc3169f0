"""The arenas of devguard.transport in a run, by what their processes sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devguard.logs.values import as_number
from devguard.watch.report.track import Track

__all__ = ["ArenaUse", "collect", "quantile"]


@dataclass(frozen=True)
class ArenaUse:
    """One arena over time.

    Attributes
    ----------
    place : int
        That of its process in the history.
    last : dict
        Its newest sample, as `devguard.transport.Arena.sample` returns it; any value may be missing or of another type.
    most : dict of str to int
        The most that a sample had of each number.
    """

    place: int
    last: dict[str, Any]
    most: dict[str, int]

    def number(self, name: str) -> int | None:
        """Return a number of the newest sample; None if there is none."""
        return _as_number(self.last.get(name))


def collect(tracks: Sequence[Track]) -> list[ArenaUse]:
    """Return the arenas of all processes."""
    found: dict[tuple[int, object], ArenaUse] = {}
    for place, track in enumerate(tracks):
        for sample in track.samples:
            for number, arena in enumerate(sample.arenas):
                key = place, str(arena.get("address", number))
                known = found.get(key)
                most = {} if known is None else known.most
                for name, value in arena.items():
                    size = _as_number(value)
                    if size is not None:
                        most[name] = max(most.get(name, 0), size)
                found[key] = ArenaUse(place, arena, most)
    return list(found.values())


def quantile(arena: ArenaUse, part: float) -> float | None:
    """Return the bound in seconds below which a part of all leases has ended after its put.

    None if no lease has, and infinity if the last bound is too small.
    """
    times = arena.last.get("release_seconds")
    if not isinstance(times, dict):
        return None
    bounds, counts = times.get("bounds"), times.get("counts")
    if not isinstance(bounds, list) or not isinstance(counts, list) or not counts:
        return None
    if any(_as_number(count) is None for count in counts) or counts[-1] == 0 or len(counts) != len(bounds) + 1:
        return None
    if not all(isinstance(bound, int | float) for bound in bounds):
        return None
    place = bisect_left(counts, part * counts[-1])
    return float(bounds[place]) if place < len(bounds) else float("inf")


def _as_number(value: Any) -> int | None:
    try:
        return as_number(value)
    except TypeError:
        return None
