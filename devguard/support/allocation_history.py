"""Which line allocated memory on a device: read from the history that torch keeps of its allocations, if it keeps one.

A context that some call opened by naming another device passes no door, and afterwards only the context is there. Where
torch records its memory history (``torch.cuda.memory._record_memory_history``), the line is in it. The pytest plugin
records it; a program may do so itself. Recording costs less than a microsecond for each allocation. Nothing here
initialises CUDA, and what is allocated past torch's allocator is not seen.
"""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from devguard.support import callsite
from devguard.support.callsite import Frame, Origin

__all__ = ["count", "newest", "record", "stop"]

MAX_ENTRIES = 20_000  # of allocations and releases, over all devices; older ones are forgotten

_recording = False


def record() -> None:
    """Let torch keep its history from now on. Nothing where CUDA is not initialised, or where somebody records it."""
    global _recording
    if not _initialized() or _kept():
        return
    memory = sys.modules["torch"].cuda.memory
    memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=MAX_ENTRIES)
    _recording = True


def stop() -> None:
    """Let torch keep no history any more, if `record` asked for it."""
    global _recording
    if _recording and _initialized():
        sys.modules["torch"].cuda.memory._record_memory_history(enabled=None)
    _recording = False


def count(index: int) -> int:
    """Return how often torch's allocator has given out memory on the device `index` of this process."""
    if not _initialized():
        return 0
    stats = sys.modules["torch"]._C._cuda_memoryStats(index)
    return int(stats["allocation"]["all"]["allocated"])


def newest(index: int, number: int) -> tuple[Origin | None, int]:
    """Return where the first of the newest allocations on a device was made, and the bytes of all of them.

    Parameters
    ----------
    index : int
        The device.
    number : int
        How many of the newest allocations to look at.

    Returns
    -------
    origin : Origin or None
        None if torch keeps no history, or no longer has them in it.
    nbytes : int
        Their bytes, as far as the history has them.
    """
    if number < 1 or not _initialized() or not _kept():
        return None, 0
    traces = sys.modules["torch"]._C._cuda_memorySnapshot(None)["device_traces"]
    made = [entry for entry in traces[index] if entry["action"] == "alloc"][-number:]
    if not made:
        return None, 0
    return _origin(made[0]["frames"]), sum(entry["size"] for entry in made)


def _initialized() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _kept() -> bool:
    asked = getattr(sys.modules["torch"]._C, "_cuda_isHistoryEnabled", None)  # crashes before CUDA is initialised
    return asked is not None and bool(asked())


def _origin(frames: list[dict[str, Any]]) -> Origin | None:
    """Return the origin that a stack of torch's history describes, innermost frame first."""
    stack = tuple(Frame(_code(frame["filename"], frame["name"]), frame["line"]) for frame in frames)
    for code, line in stack:
        if callsite.is_user(code):
            return Origin(code, line, None, stack[: callsite.STACK_DEPTH])
    return None


def _code(file: str, name: str) -> CodeType:
    """Return a code object that stands for a function known by name only: call sites are kept as such."""
    names = ("co_name", "co_qualname") if sys.version_info >= (3, 11) else ("co_name",)
    named: dict[str, Any] = dict.fromkeys(names, name)
    return _template.__code__.replace(co_filename=file, **named)


def _template() -> None:
    """Give `_code` something to copy."""
