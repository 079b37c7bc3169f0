"""The door ``native``: contexts on devices that this process does not own, and that no other door explains.

C++ threads, operators that choose a device themselves, and Python code that names another device open contexts without
passing a door. The door compares the contexts of the process with its owners: after the outermost call of a decorated
function, coroutine or generator (at most every 0.1 s), around ``no_strays()``, in ``strays()`` and ``status()``, at the
end of the process, and at the other times listed in docs/doors.md; not at the end of a ``with`` block.

A context cannot be closed again, so mode ``error`` only records it. Where torch keeps a history of its allocations
(allocation_history.py), as under the pytest plugin, the record has the line that opened the context; elsewhere it has
the event after which the context was found. ``devguard run --trace-contexts`` names the call that opened it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import unguarded_contexts
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
from devguard.reporting.verdict import judge_too_late
from devguard.support import accelerator, allocation_history, allocator, forks, process_exit
from devguard.support.callsite import Origin
from devguard.support.installed_torch import release

__all__ = ["accept", "inspect", "install", "status", "uninstall"]

NAME = "native"

_lock = forks.new_lock()


class _State:
    """The state of this door.

    Attributes
    ----------
    is_open : bool
        Whether the door is open.
    accepted : frozenset of int
        The devices with accepted contexts, which are no strays. Contexts from before the doors opened belong to the
        door ``first_touch``.
    found : set of int
        The devices on which a foreign context was found.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.accepted: frozenset[int] = frozenset()
        self.found: set[int] = set()


_state = _State()


def install() -> None:
    """Open the door, and accept the contexts that exist already."""
    accept()
    _state.found.clear()
    _state.is_open = True
    process_exit.register(_look_at_end)


def uninstall() -> list[str]:
    """Close the door."""
    _state.is_open = False
    process_exit.forget(_look_at_end)
    return []


def accept(devices: Iterable[int] | None = None) -> None:
    """Accept the contexts that exist now, or contexts on these devices as well: they are no strays."""
    _state.accepted = frozenset(accelerator.contexts() if devices is None else {*_state.accepted, *devices})


def status() -> dict[str, Any]:
    """Return the devices with accepted contexts, and the devices on which foreign contexts were found."""
    return {
        "before": [f"cuda:{index}" for index in sorted(_state.accepted)],
        "foreign": [f"cuda:{index}" for index in sorted(_state.found)],
    }


def inspect(where: str, asked_by: Origin | None = None) -> None:
    """Compare the contexts of this process with its owners, and record each new foreign one once.

    Parameters
    ----------
    where : str
        The event just before, for the record, such as ``"at the end of no_strays()"``.
    asked_by : Origin, optional
        The call site to record if the line that opened a context is unknown; by default the line that looks.
    """
    owned = owned_tags()
    if not _state.is_open or not owned:
        return
    foreign = [index for index in accelerator.contexts() if f"cuda:{index}" not in owned]
    new = [index for index in foreign if index not in _state.accepted and index not in _state.found]
    if not new:
        return
    explained = {tag for stray in journal.strays() for tag in stray.devices_used}
    mode = in_force.mode_of(NAME)
    for index in new:
        tag = f"cuda:{index}"
        with _lock:
            if index in _state.found:
                continue
            _state.found.add(index)
        if mode == "off" or explained & {tag, "cuda"} or tag in allowlist.allowances() or index in unguarded_contexts:
            continue
        note = f"found {where}; {_describe_use(index)}"
        opened_by, nbytes = allocation_history.newest(index, allocation_history.count(index))
        origin, start = opened_by or asked_by, sys._getframe(1)
        found = Occurrence(NAME, tag, ", ".join(owned), nbytes, start, note=note, origin=origin)
        judge_too_late(found, mode)


def _look_at_end() -> None:
    inspect("at the end of the process")


def _describe_use(index: int) -> str:
    """Describe, for the record, how a context on device `index` was used."""
    if allocation_history.count(index):
        peak = allocator.statistics(index)["allocated_bytes"]["all"]["peak"]
        return f"torch's allocator was used there (peak {peak} bytes): a call named this device or found it current"
    if _is_of_a_peer_copy():
        return (
            "torch's allocator was not used there, and every visible GPU has a context: torch 2.11 and newer opens "
            "them all at the first copy between two GPUs, as tensor.to('cuda:2') of a tensor on cuda:1"
        )
    names = sorted({name for name in _list_native_threads() if name})
    pinned = "pinned memory (pin_memory=True), " if allocator.has_pinned_memory() else ""
    return (
        f"torch's allocator was not used there: {pinned}a query, a stream, an event or a library opened it. "
        f"Native threads of this process: {', '.join(names) or 'none'}"
    )


def _is_of_a_peer_copy() -> bool:
    """Return whether the contexts look as torch leaves them after a copy between GPUs, away from its two ends."""
    held = accelerator.contexts()
    used = [index for index in held if allocation_history.count(index)]
    return release() >= (2, 11) and 2 < len(held) == accelerator.device_count() and len(used) > 1


def _list_native_threads() -> list[str]:
    """Return the names of the threads of this process that Python did not start; empty outside Linux."""
    known = {thread.native_id for thread in threading.enumerate()}
    names = []
    try:
        for task in os.listdir("/proc/self/task"):
            if int(task) not in known:
                with open(f"/proc/self/task/{task}/comm") as file:
                    names.append(file.read().strip())
    except OSError:
        return names  # This system has no /proc, or a thread ended meanwhile.
    return names
