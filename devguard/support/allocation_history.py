"""The lines that allocated memory on a device, read from torch's history of its allocations.

A context that a call opens by naming another device passes no door, and afterwards only the context is there. If torch
records its memory history (``torch.cuda.memory._record_memory_history``), the line is in it. ``no_strays()`` and the
pytest plugin record the history, and a program can do so too. Recording costs less than a microsecond per allocation.
Nothing here initialises CUDA. Memory that is allocated without torch's allocator is not in the history; the allocator
``cudaMallocAsync`` keeps none, and counts only the bytes in use.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from types import CodeType
from typing import Any, NamedTuple

from devguard.support import accelerator, allocator, callsite
from devguard.support.callsite import Frame, Origin

__all__ = ["count", "count_since", "newest", "newest_lines", "record", "stop", "Usage", "usage"]

MAX_ENTRIES = 20_000  # allocations and releases, over all devices; torch forgets older ones


class _State:
    """The users of the history, and whether it was started here; torch itself has one history for the process."""

    def __init__(self) -> None:
        self.users: list[object] = []
        self.recording = False


_state = _State()


def record(user: object = None) -> None:
    """Make torch keep a history until every user has called `stop`; from the initialisation of CUDA on, if it is due.

    Where torch keeps a history already, or its allocator cannot keep one, do nothing.
    """
    if user not in _state.users:
        _state.users.append(user)
    if accelerator.is_initialized():
        _start()
    else:
        accelerator.call_when_initialized(_start)


def stop(user: object = None) -> None:
    """Make torch stop its history after its last user, if `record` started it."""
    if user in _state.users:
        _state.users.remove(user)
    if _state.recording and not _state.users:
        _state.recording = False
        if accelerator.is_initialized():
            allocator.stop_history()


def _start() -> None:
    if _state.users and not allocator.keeps_history():
        _state.recording = allocator.record_history(MAX_ENTRIES)


class Usage(NamedTuple):
    """What torch's allocator counts on one device.

    Attributes
    ----------
    number, total : int
        The number and the bytes of all allocations so far; 0 if the allocator does not count them.
    held, peak : int
        The bytes in use, and the most that were in use at a time.
    freed, reserved : int
        The bytes of all releases so far, and the bytes that the allocator holds for the program, in use or not.
    """

    number: int
    total: int
    held: int
    peak: int = 0
    freed: int = 0
    reserved: int = 0

    def since(self, before: Usage) -> Usage:
        """Return the number and the bytes of the allocations since `before`, and the bytes of them in use, at least."""
        if self.number < before.number or self.total < before.total:
            before = before._replace(number=0, total=0)  # the program has reset the counters
        held = max(0, self.held - before.held, self.peak - before.peak)
        return Usage(self.number - before.number, max(self.total - before.total, held), held)

    def is_reset(self, before: Usage) -> bool:
        """Return whether the program seems to have reset the counters since `before`, so that `since` is too low.

        The bytes allocated, less those released and those in use, change only if the counters are reset. If nothing was
        in use then, the other counters show an allocation that the number of allocations does not.
        """
        if self.number < before.number or self.total < before.total or self.freed < before.freed:
            return True
        if self.total - self.freed - self.held != before.total - before.freed - before.held:
            return True
        return self.number == before.number and (self.peak > before.peak or self.reserved > before.reserved)


def usage(index: int) -> Usage:
    """Return what torch's allocator has counted on the device `index` in this process; opens no context."""
    stats = allocator.statistics(index)
    if not stats:
        return Usage(0, 0, 0)
    number, memory = stats["allocation"]["all"]["allocated"], stats["allocated_bytes"]["all"]
    reserved = stats["reserved_bytes"]["all"]["current"]
    return Usage(number, memory["allocated"], memory["current"], memory["peak"], memory["freed"], reserved)


def count(index: int) -> int:
    """Return the number of allocations that torch's allocator has made on the device `index` in this process."""
    return usage(index).number


def newest(index: int, number: int) -> tuple[Origin | None, int]:
    """Return the origin of the first of the newest allocations on a device, and the bytes of all of them.

    Parameters
    ----------
    index : int
        The device.
    number : int
        The number of the newest allocations to read.

    Returns
    -------
    origin : Origin or None
        None if torch keeps no history, or if the allocations are no longer in it.
    nbytes : int
        The bytes of those allocations that are in the history.
    """
    made = newest_lines(index, number)
    return (made[0][0], sum(nbytes for _, _, nbytes in made)) if made else (None, 0)


def newest_lines(
    index: int, number: int, by: Collection[CodeType] | None = None
) -> list[tuple[Origin | None, int, int]]:
    """Return the newest allocations on a device by call site, the oldest site first: origin, number and bytes.

    Of the `number` newest, those that one of the functions `by` has made, itself or in a call; by default all.
    """
    if number < 1 or not allocator.keeps_history():
        return []
    names = None if by is None else {(code.co_filename, code.co_name) for code in by}
    made: dict[object, list[dict[str, Any]]] = {}
    for entry in _allocations(index)[-number:]:
        if names is None or any((frame["filename"], frame["name"]) in names for frame in entry["frames"]):
            made.setdefault(_site(entry["frames"]), []).append(entry)
    return [(_origin(row[0]["frames"]), len(row), sum(entry["size"] for entry in row)) for row in made.values()]


def count_since(index: int, moment: float) -> int:
    """Return the number of allocations on a device since a time, in seconds since 1970, that are in the history."""
    if not allocator.keeps_history():
        return 0
    return sum(entry.get("time_us", 0) >= moment * 1e6 for entry in _allocations(index))


def _allocations(index: int) -> list[dict[str, Any]]:
    """Return the allocations in the history of a device, the oldest first."""
    return [entry for entry in allocator.history(index) if entry["action"] == "alloc"]


def _site(frames: list[dict[str, Any]]) -> tuple[str, int] | None:
    """Return file and line of the innermost frame of user code in a stack of torch's history."""
    origin = _origin(frames)
    return None if origin is None or origin.code is None else (origin.code.co_filename, origin.line)


def _origin(frames: list[dict[str, Any]]) -> Origin | None:
    """Return the origin that a stack of torch's history, innermost frame first, describes."""
    stack = tuple(Frame(_code(frame["filename"], frame["name"]), frame["line"]) for frame in frames)
    for code, line in stack:
        if callsite.is_user(code):
            return Origin(code, line, None, stack[: callsite.STACK_DEPTH])
    return None


@functools.lru_cache(4096)
def _code(file: str, name: str) -> CodeType:
    """Return a code object for a function that is known by name only, because a call site holds a code object."""
    names = ("co_name", "co_qualname") if sys.version_info >= (3, 11) else ("co_name",)
    named: dict[str, Any] = dict.fromkeys(names, name)
    return _template.__code__.replace(co_filename=file, **named)


def _template() -> None:
    """Hold the code object that `_code` copies."""
