"""The door ``native``: contexts on devices that this process does not own, and that no other door explains.

Threads of C++ libraries, operators that pick a device by themselves, and Python code that names another device all open
contexts without passing a door. Afterwards the context is there: it is found by comparing the contexts of the process
with its owners, when the outermost call of a decorated function returns, at the end of ``no_strays()``, and whenever
``strays()`` or ``status()`` are asked. It cannot be given back. The line that opened it is known where torch keeps a
history of its allocations (allocation_history.py), as under the pytest plugin; elsewhere the record says after what it
was found and what is known of it. ``devguard run --trace-contexts`` answers exactly.

Contexts that existed before the doors opened belong to the door ``first_touch``.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import unguarded_contexts
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.reporting.stray import LEFT
from devguard.support import accelerator, allocation_history
from devguard.support.callsite import Origin

__all__ = ["accept", "inspect", "install", "status", "uninstall"]

NAME = "native"

_lock = threading.Lock()
_before: frozenset[int] = frozenset()
_seen: set[int] = set()
_open = False


def install() -> None:
    """Note the contexts that are there already."""
    global _before, _open
    _before = frozenset(accelerator.contexts())
    _seen.clear()
    _open = True


def uninstall() -> list[str]:
    """Stop comparing."""
    global _open
    _open = False
    return []


def accept() -> None:
    """Hold nobody responsible for the contexts that there are now."""
    global _before
    _before = frozenset(accelerator.contexts())


def status() -> dict[str, Any]:
    """Return the contexts that nobody is held responsible for, and the foreign ones found."""
    return {
        "before": [f"cuda:{index}" for index in sorted(_before)],
        "foreign": [f"cuda:{index}" for index in sorted(_seen)],
    }


def inspect(where: str, asked_by: Origin | None = None) -> None:
    """Compare the contexts of this process with its owners, and record each new foreign one once.

    Parameters
    ----------
    where : str
        What has just happened, for the record: the scope that ended, or the question that was asked.
    asked_by : Origin, optional
        The call site of a context whose line is not known; the line that asks, by default.
    """
    owned = owned_tags()
    if not _open or not owned:
        return
    foreign = [index for index in accelerator.contexts() if f"cuda:{index}" not in owned]
    new = [index for index in foreign if index not in _before and index not in _seen]
    if not new:
        return
    left = [stray for stray in journal.strays() if stray.action not in ("repaired", "placed")]
    explained = {tag for stray in left for tag in stray.source.split(",")}
    mode = in_force.mode_of(NAME)
    for index in new:
        tag = f"cuda:{index}"
        with _lock:
            if index in _seen:
                continue
            _seen.add(index)
        if mode == "off" or explained & {tag, "cuda"} or tag in allowlist.allowances() or index in unguarded_contexts:
            continue
        action = LEFT.get(mode, "observed")
        note = f"found {where}; {_evidence(index)}"
        opened_by, nbytes = allocation_history.newest(index, allocation_history.count(index))
        origin, start = opened_by or asked_by, sys._getframe(1)
        journal.record(NAME, tag, tag, ", ".join(owned), action, nbytes, note=note, start=start, origin=origin)


def _evidence(index: int) -> str:
    """Say what is known of a context on device `index`."""
    torch = sys.modules["torch"]
    stats = torch.cuda.memory_stats(index)
    peak = stats.get("allocated_bytes.all.peak", 0)
    if stats.get("allocation.all.allocated", 0):
        return f"torch's allocator was used there (peak {peak} bytes): some call named this device or found it current"
    names = sorted({name for name in _native_threads() if name})
    return (
        "torch's allocator was not used there: a query, a stream, an event or a library did it. "
        f"Native threads of this process: {', '.join(names) or 'none'}"
    )


def _native_threads() -> list[str]:
    """Return the names of this process's threads that Python did not start (Linux)."""
    known = {thread.native_id for thread in threading.enumerate()}
    names = []
    try:
        for task in os.listdir("/proc/self/task"):
            if int(task) not in known:
                with open(f"/proc/self/task/{task}/comm") as file:
                    names.append(file.read().strip())
    except OSError:
        return names  # another system, or a thread that has just ended
    return names
