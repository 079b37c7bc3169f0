"""torch's allocator of memory on CUDA devices: its counters and its history; accelerator.py has the devices themselves.

Nothing here initialises CUDA or opens a context. A program can put an allocator of its own in place of torch's, or
select ``cudaMallocAsync``, which counts only the bytes in use and keeps no history.
"""

from __future__ import annotations

import sys
from typing import Any

from devguard.support.accelerator import is_initialized

__all__ = [
    "has_pinned_memory",
    "history",
    "keeps_history",
    "record_history",
    "statistics",
    "stop_history",
]


def statistics(index: int) -> dict[str, Any]:
    """Return the statistics of torch's allocator for a device, nested; empty if there are none (yet)."""
    try:
        stats: dict[str, Any] = sys.modules["torch"]._C._cuda_memoryStats(index) if is_initialized() else {}
    except RuntimeError:
        return {}  # the program has put its own allocator in place of torch's
    return stats


def has_pinned_memory() -> bool:
    """Return whether torch has pinned host memory in this process, which opens a context."""
    count = getattr(sys.modules["torch"]._C, "_cuda_hostMemoryStats", None)
    return count is not None and bool(count()["num_host_alloc"])


def keeps_history() -> bool:
    """Return whether torch keeps a history of its allocations."""
    # The C function crashes before CUDA is initialised.
    check = getattr(sys.modules["torch"]._C, "_cuda_isHistoryEnabled", None) if is_initialized() else None
    try:
        return check is not None and bool(check())
    except RuntimeError:
        return False  # this allocator keeps none


def record_history(max_entries: int) -> bool:
    """Make torch keep a history of `max_entries` allocations and releases with Python stacks; return whether it can."""
    memory = sys.modules["torch"].cuda.memory
    try:
        memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=max_entries)
    except RuntimeError:
        return False  # as cudaMallocAsync
    return True


def stop_history() -> None:
    """Make torch stop its history."""
    sys.modules["torch"].cuda.memory._record_memory_history(enabled=None)


def history(index: int) -> list[dict[str, Any]]:
    """Return the history of the allocations on a device, oldest first."""
    history: list[dict[str, Any]] = sys.modules["torch"]._C._cuda_memorySnapshot(None)["device_traces"][index]
    return history
