"""The door ``threads``: a Python thread starts with the scopes of the code that starts it, on the owner's device.

torch starts every thread on device 0. Here a thread takes over the scopes in force when ``start()`` is called, and a
task of a pool those in force when it is submitted. When a thread starts, it is unknown whether it will use a GPU. So
the thread is *placed*, which is no stray; the mode ``error`` refuses it only where it is set for this door by name.

Out of reach: threads that ran before the door opened, ``_thread.start_new_thread``, and threads of C++ code. See
docs/doors.md, thread_plan.py and thread_run.py for the two halves of a start, pools.py and foreign_pools.py for tasks,
and handover.py for threads that outlive the scope in which they were started.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from devguard.doors.concurrency import foreign_pools, handover, loops, pools, thread_plan, thread_run
from devguard.doors.concurrency.pools import Replacement
from devguard.doors.concurrency.thread_plan import failures, recall
from devguard.ownership import greenlets
from devguard.ownership.process import process
from devguard.ownership.stack import inherit_with, local
from devguard.support import accelerator
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

_patches = Patches()
_before: list[str] = []
_OUT_OF_REACH = "threads that ran before the door opened, _thread.start_new_thread, threads of C++ code"


def install() -> None:
    """Patch the start and end of threads, and the tasks of pools: all of it, or nothing."""
    failures.clear()
    handover.fallen_back.clear()
    known = (threading.main_thread(), threading.current_thread())
    _before[:] = sorted(thread.name for thread in threading.enumerate() if thread not in known)
    found = [*_thread(), *pools.replacements(_patches), *handover.replacements(_patches), *loops.replacements(_patches)]
    for owner, name, ours in found:
        _patches.replace(owner, name, ours)
    inherit_with(thread_run.inherit)
    foreign_pools.watch(_patches)


def uninstall() -> list[str]:
    """Put the methods of Python and of libraries back."""
    foreign_pools.unwatch()
    inherit_with(None)
    thread_plan.planned.clear()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which threads ran before the door opened, which fell back, what is out of reach, and our own errors."""
    return {
        "threads_before": list(_before),
        "fallen_back": list(handover.fallen_back),
        "out_of_reach": _OUT_OF_REACH,
        "failures": list(failures),
    }


def _thread() -> Iterator[Replacement]:
    """Replace methods of ``Thread``: plan a thread where it is started, and set its device where it begins to run."""
    # gevent puts a subclass in its place, which inherits them.
    thread = next(each for each in threading.Thread.__mro__ if "_bootstrap_inner" in vars(each))
    start, bootstrap = _patches.find(thread, "start"), _patches.find(thread, "_bootstrap_inner")
    _patches.find(thread, "_delete")  # thread_run.call_at_end needs it
    planned, get_frame = thread_plan.planned, sys._getframe
    limbo = threading._limbo  # type: ignore[attr-defined]
    is_python_3_10 = sys.version_info < (3, 11)  # asked once: reading the attributes of each thread takes time
    set_device: Any = accelerator.unwatched_set_device()

    def start_with_scopes(self: Any) -> None:
        stack = local.stack
        if stack or process.owner is not None:
            key: Any = None
            ident: Any = None
            try:
                ident = self._ident  # None: it has not been started before
                target = self._target
                code = target.__code__ if type(target) is FunctionType else getattr(target, "__code__", None)
                caller = get_frame(1)
                key = type(self), id(code), id(caller.f_code), caller.f_lasti
            except Exception:  # noqa: BLE001 - it has run, C code starts it, or the target's own __getattr__ fails
                code = None
            plan = recall(stack, key) or failures.safely(thread_plan.plan_thread, self, key, code)
            if plan is not None and ident is None:
                planned[id(self)] = plan
                try:
                    start(self)
                except BaseException:  # an interrupt may have ended only the wait for a thread that runs
                    if self not in limbo and not thread_run.is_running(self):
                        planned.pop(id(self), None)
                    raise
                return
        start(self)

    def bootstrap_within(self: Any) -> None:
        plan = planned.get(id(self))
        if plan is None:
            bootstrap(self)
            return
        if greenlets.is_imported():  # the first to ask for the scopes may be a greenlet of this thread, and keep them
            failures.safely(thread_run.take_over, self, plan, local.stack)
        if plan.observed:
            failures.safely(thread_run.call_at_end, self, functools.partial(thread_run.end, plan))
        elif plan.device >= 0:
            try:
                set_device(plan.device)  # torch's own: the door set_device does not judge devguard
            except Exception as error:  # noqa: BLE001 - as in Failures.safely, without a further frame
                failures.record(error)
        try:
            bootstrap(self)
        finally:
            if is_python_3_10:
                thread_run.call_forgotten(self)
            planned.pop(id(self), None)

    yield thread, "start", start_with_scopes
    yield thread, "_bootstrap_inner", bootstrap_within
