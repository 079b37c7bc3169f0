"""Threads that take work from others after the scope in which they were started has ended; for the door ``threads``.

A thread keeps the scopes that it took over for all of its own work, however long that takes. But a worker that a
library starts lazily takes work from a queue forever, and that work belongs to other scopes, or to none. So a thread
that takes something from a queue, a pipe or a condition then keeps only the scopes that are still entered where it was
started, and else falls back to the owner of the process.

Out of reach: ``queue.SimpleQueue`` and gevent's ``Queue``, which are native code, and threads that wait for work in
another way.
"""

from __future__ import annotations

import multiprocessing.connection
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from devguard.doors.concurrency import thread_plan, thread_run
from devguard.doors.concurrency.pools import Replacement
from devguard.doors.concurrency.thread_plan import Inherited, Start, failures
from devguard.ownership.stack import Entry, Stack, local
from devguard.support import accelerator, callsite
from devguard.support.patching import Patches

__all__ = ["device_of", "fall_back", "fallen_back", "falling_back", "replacements"]

MAX_NAMES = 16

fallen_back: list[str] = []  # names of threads, for the status of the door


def replacements(patches: Patches) -> Iterator[Replacement]:
    """Yield what replaces the methods by which a thread takes work; raise `DoorError` if this Python lacks one."""
    for owner, name in ((queue.Queue, "get"), (multiprocessing.connection.Connection, "_recv_bytes")):
        if owner.__module__.partition(".")[0] in sys.stdlib_module_names:  # gevent puts a class of native code there
            yield owner, name, _taking(patches.find(owner, name))
    yield threading.Condition, "wait", _waiting(patches.find(threading.Condition, "wait"))


def _taking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that takes work."""

    def take(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = original(self, *args, **kwargs)
        stack = local.stack
        if stack.inherited is not None:
            failures.safely(fall_back, stack)
        return taken

    return take


def falling_back(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that first leaves the scopes that were left where this thread was started."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        if stack.inherited is not None:
            failures.safely(fall_back, stack)
        return original(*args, **kwargs)

    return serve


def _waiting(original: Callable[..., bool]) -> Callable[..., bool]:
    """Return ``Condition.wait``, by which a worker waits for work unless the standard library calls it."""
    wait_for = getattr(threading.Condition.wait_for, "__code__", None)

    def wait(self: Any, timeout: Any = None) -> bool:  # each start of a thread waits
        notified = original(self, timeout)
        stack = local.stack
        if stack.inherited is not None:
            caller: Any = sys._getframe(1)
            if caller.f_code is wait_for:
                caller = caller.f_back
            # `_feed` sends what other threads put into a queue of multiprocessing. `Event` is a signal, not work.
            if caller is not None and (callsite.is_user(caller.f_code) or caller.f_code.co_name == "_feed"):
                failures.safely(fall_back, stack)
        return notified

    return wait


def fall_back(stack: Stack) -> None:
    """Leave the scopes that this thread took over and that are no longer entered where it was started."""
    start: Start = stack.inherited
    if stack.task is not None or len(stack) != len(start.entries):
        return  # the thread is inside a task, or inside a scope of its own
    kept = tuple([entry for entry in stack if isinstance(entry[0], Inherited) and entry[0].is_in_force()])
    if len(kept) == len(stack) or _is_of_torch(threading.current_thread()):
        return
    thread_run.end(start) if start.observed else thread_run.judge_leftovers()
    stack[:], stack.judged = kept, None
    index = device_of(kept)
    stack.inherited = Start(kept, index) if kept else None
    if start.device >= 0 and index >= 0 and accelerator.current_device() == start.device:
        accelerator.bind().back(index)
    if len(fallen_back) < MAX_NAMES:
        fallen_back.append(threading.current_thread().name)


def device_of(kept: tuple[Entry, ...]) -> int:
    """Return the device of a thread with these scopes, -1 for the one that it has; as a new thread, 0 by default."""
    if kept:
        owner = kept[-1][1]
        return -1 if owner is None else owner.index
    worker = thread_plan.plan_worker()
    return 0 if worker is None else worker.device


def _is_of_torch(thread: threading.Thread) -> bool:
    """Return whether a thread runs a function of torch, which selects its device itself, as a loader's does."""
    return (getattr(getattr(thread, "_target", None), "__module__", None) or "").partition(".")[0] == "torch"
