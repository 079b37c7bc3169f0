"""Memory that torch's allocator hands out on devices without an owner here, since a picture was taken.

If the context of a device is open already, no new context shows that work went there, and the memory may be free again
at the end. So the picture holds the allocator's counters, which open nothing. Memory from elsewhere (``cudaMalloc``,
NCCL, an allocator of the program) is not in them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from types import CodeType
from typing import NamedTuple

from devguard.modes import DoorMode
from devguard.ownership.owner import owned_tags
from devguard.reporting import allowlist
from devguard.reporting.journal import Mark, journal
from devguard.reporting.stray import Occurrence, Stray
from devguard.reporting.verdict import judge_too_late
from devguard.support import accelerator, allocation_history
from devguard.support.allocation_history import Usage
from devguard.support.callsite import Origin

__all__ = ["is_memory", "Picture", "record_growth", "take_picture"]

NAME = "native"  # the door
_NOTE = "torch allocated memory there"


class Picture(NamedTuple):
    """The contexts of this process, what torch's allocator had counted on each of their devices, and the time."""

    memory: dict[int, Usage]
    moment: float  # seconds since 1970

    @property
    def contexts(self) -> list[str]:
        """The names of the devices with a context."""
        return [f"cuda:{index}" for index in self.memory]


def take_picture() -> Picture:
    """Return the present picture; opens no context."""
    return Picture({index: allocation_history.usage(index) for index in accelerator.contexts()}, time.time())


def is_memory(stray: Stray) -> bool:
    """Return whether `record_growth` recorded a stray."""
    return stray.door == NAME and (stray.note or "").startswith(_NOTE)


def record_growth(
    before: Picture,
    mark: Mark,
    mode: DoorMode,
    origin: Origin | None = None,
    accepted: Collection[int] = (),
    by: Collection[CodeType] | None = None,
) -> list[str]:
    """Record the memory since `before` on devices that have no owner here: a stray for each line that allocated it.

    Parameters
    ----------
    before : Picture
        The devices as they were.
    mark : Mark
        The journal at that time: later strays explain the memory that they left on their devices.
    mode : str
        The mode in force for the door ``native``.
    origin : Origin, optional
        The call site of memory that torch's history does not explain; by default the caller's.
    accepted : collection of int
        Devices on which memory is no stray.
    by : collection of code, optional
        Record only what one of these has allocated, itself or in a call; by default all.

    Returns
    -------
    list of str
        The devices with memory that was left out because of `by`.
    """
    left_out: list[str] = []
    owned, allowed = owned_tags(), allowlist.allowances()
    if mode == "off" or not owned:
        return left_out
    strays = journal.since(mark)
    for index, now in take_picture().memory.items():
        tag = f"cuda:{index}"
        grown = _growth(before, index, now)
        if not (grown.number or grown.held) or tag in owned or tag in allowed or index in accepted:
            continue
        named = [stray for stray in strays if tag in stray.devices_used]
        if any(stray.site is None or not stray.bytes for stray in named):
            continue  # Such a stray, as of a thread that starts there, explains all that follows on the device.
        known = {(stray.site.file, stray.site.line) for stray in named if stray.site is not None}
        lines = allocation_history.newest_lines(index, grown.number, by)
        number, total = grown.number - sum(line[1] for line in lines), grown.total - sum(line[2] for line in lines)
        if by is not None and (number > 0 or not lines):
            left_out.append(tag)
        elif number > 0 or not lines:  # more than torch's history holds
            lines.append((None, max(number, 1), max(total, 0)))
        for line, times, nbytes in lines:
            where = line or origin
            if where is not None and where.code is not None and (where.code.co_filename, where.line) in known:
                continue
            note = f"{_NOTE} {times} x, unseen by any door"
            found = Occurrence(NAME, tag, ", ".join(owned), nbytes, sys._getframe(1), note=note, origin=where)
            judge_too_late(found, mode)
    return left_out


def _growth(before: Picture, index: int, now: Usage) -> Usage:
    """Return what a device has allocated since a picture; from the history, if the counters were reset."""
    earlier = before.memory.get(index, Usage(0, 0, 0))
    grown = now.since(earlier)
    if not now.is_reset(earlier):
        return grown
    return grown._replace(number=max(grown.number, allocation_history.count_since(index, before.moment)))
