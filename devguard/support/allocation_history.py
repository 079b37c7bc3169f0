"""The lines that allocated memory on a device, read from torch's history of its allocations.

A context that a call opens by naming another device passes no door, and afterwards only the context is there. If torch
records its memory history (``torch.cuda.memory._record_memory_history``), the line is in it. The pytest plugin records
the history, and a program can do so too. Recording costs less than a microsecond per allocation. Nothing here
initialises CUDA. Memory that is allocated without torch's allocator is not in the history.
"""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from devguard.support import accelerator, callsite
from devguard.support.callsite import Frame, Origin

__all__ = ["count", "newest", "record", "stop"]

MAX_ENTRIES = 20_000  # allocations and releases, over all devices; torch forgets older ones

_recording = False


def record() -> None:
    """Make torch keep a history from now on, unless CUDA is not initialised or torch keeps one already."""
    global _recording
    if accelerator.is_initialized() and not accelerator.keeps_memory_history():
        accelerator.record_memory_history(MAX_ENTRIES)
        _recording = True


def stop() -> None:
    """Make torch stop its history, if `record` started it."""
    global _recording
    if _recording and accelerator.is_initialized():
        accelerator.stop_memory_history()
    _recording = False


def count(index: int) -> int:
    """Return the number of allocations that torch's allocator has made on the device `index` in this process."""
    stats = accelerator.memory_stats(index)
    return int(stats["allocation"]["all"]["allocated"]) if stats else 0


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
    if number < 1 or not accelerator.keeps_memory_history():
        return None, 0
    made = [entry for entry in accelerator.memory_history(index) if entry["action"] == "alloc"][-number:]
    if not made:
        return None, 0
    return _origin(made[0]["frames"]), sum(entry["size"] for entry in made)


def _origin(frames: list[dict[str, Any]]) -> Origin | None:
    """Return the origin that a stack of torch's history, innermost frame first, describes."""
    stack = tuple(Frame(_code(frame["filename"], frame["name"]), frame["line"]) for frame in frames)
    for code, line in stack:
        if callsite.is_user(code):
            return Origin(code, line, None, stack[: callsite.STACK_DEPTH])
    return None


def _code(file: str, name: str) -> CodeType:
    """Return a code object for a function that is known by name only, because a call site holds a code object."""
    names = ("co_name", "co_qualname") if sys.version_info >= (3, 11) else ("co_name",)
    named: dict[str, Any] = dict.fromkeys(names, name)
    return _template.__code__.replace(co_filename=file, **named)


def _template() -> None:
    """Hold the code object that `_code` copies."""
