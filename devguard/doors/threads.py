"""The door ``threads``: a Python thread starts with the scopes of whoever started it, on the owner's device.

torch starts every thread on device 0. Here a thread (`threading.Thread`, its subclasses, ``Timer``) takes over the
scopes that its creator is in when ``start()`` is called, ``unguarded()`` included, and the owner's device is set. A
pool (``ThreadPoolExecutor``, and with it ``asyncio.to_thread`` and ``run_in_executor``; ``ThreadPool`` of
``multiprocessing.pool``) does so for each task, with the scopes of who submitted it. A task submitted outside every
scope runs on what its worker chose, as an ``initializer`` does, else on the device of the process's owner
(``devguard.install``).

Whether a thread will use a GPU nobody knows when it starts. So a thread, or a task, of the user's that would have run
on another device than the owner's is not called a stray: it is *placed*, which copies nothing, and recorded as that.
The mode ``error`` places too; it refuses at the start only where it is set for this door by name, as in
``doors={"threads": "error"}``. Threads of the standard library and of torch, and functions that devguard has decorated,
are placed without a record.

In the modes ``observe`` and ``warn`` the scopes are inherited and the device is not set. There a thread is a stray if,
as it ends, the context of a device that nobody in this process has owned is current on it: it has worked there. A
device that it left before is not seen; and where device 0 held a context already, a thread that worked elsewhere by
name has come back to it, and is recorded too. So it is with the tasks of pools, unless such a context is current as the
task begins, because an ``initializer`` or a task before chose it: that task would run there, and is recorded at once.
``off`` for this door alone leaves threads as torch starts them.

Not seen here: threads that ran before the door opened (a pool's tasks are), ``_thread.start_new_thread``, and threads
of C++ code. Pools of other makes start threads as anybody does: a worker keeps the scopes of the task that started it.
"""

from __future__ import annotations

import multiprocessing.pool
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread as futures
from typing import Any

from devguard import scope, takeover
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.patching import DoorError, Patches
from devguard.takeover import Start

__all__ = ["install", "status", "uninstall"]

NAME = "threads"

_patches = Patches()
_before: list[str] = []
_OUT_OF_REACH = "threads that ran before the door opened, _thread.start_new_thread, threads of C++ code"
_POOL_METHODS = ("apply_async", "_map_async", "imap", "imap_unordered")
# the attribute of a thread, or a pool's task, that holds its Start until it runs; of an observed thread, until it ends
_KEPT = "_devguard_start"


def install() -> None:
    """Hook the start and end of threads, and the tasks of pools."""
    import torch

    takeover.failures.clear()
    known = (threading.main_thread(), threading.current_thread())
    _before[:] = sorted(thread.name for thread in threading.enumerate() if thread not in known)
    names = ("start", "_bootstrap_inner", "_delete")
    start, bootstrap, delete = (_find(threading.Thread, name) for name in names)
    submit = _find(futures.ThreadPoolExecutor, "submit")
    init, run = (_find(futures._WorkItem, name) for name in ("__init__", "run"))
    local, process, get_ident, begun = scope.local, scope.process, threading.get_ident, takeover.begun
    set_device: Any = getattr(torch._C, "_cuda_setDevice", None)
    set_device = getattr(set_device, "__wrapped__", set_device)  # devguard's own change is nobody's to judge

    def start_with_scopes(self: Any) -> None:
        if local.stack or process.owner is not None:
            begin = takeover.safely(_plan_thread, self)
            if begin is not None:
                self.__dict__[_KEPT] = begin
        start(self)

    def bootstrap_within(self: Any) -> None:
        begin = self.__dict__.pop(_KEPT, None)
        if begin is not None:
            begun[get_ident()] = begin
            if begin.observed:
                self.__dict__[_KEPT] = begin
            elif begin.device >= 0:
                takeover.safely(set_device, begin.device)
        elif begun:
            begun.pop(get_ident(), None)  # numbers come again, after a fork too
        bootstrap(self)

    def settle_and_delete(self: Any) -> None:
        if begun:
            if _KEPT in self.__dict__:
                takeover.safely(takeover.judge_end, self.__dict__.pop(_KEPT))
            if begun.pop(get_ident(), self) is None:
                takeover.settle()
        delete(self)

    def submit_in_scope(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if scope.local.stack:
            begin = takeover.safely(_plan_task, fn, self)  # before the pool takes its locks
            if begin is not None and begin.observed:
                fn, begin = _Task(fn, begin), None  # judged before its result is known
            outer, _submitted.start = _submitted.start, begin
            try:
                return submit(self, fn, *args, **kwargs)
            finally:
                _submitted.start = outer
        return submit(self, fn, *args, **kwargs)

    def keep_start(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _submitted.start is not None:
            self.__dict__[_KEPT] = _submitted.start

    def run_within(self: Any, *args: Any) -> None:
        begin = self.__dict__.pop(_KEPT, None)
        if begin is None and process.owner is None:
            run(self, *args)
            return
        try:
            left = None if begin is None else takeover.safely(takeover.enter, begin)
        except (StrayDeviceError, StrayDeviceWarning) as error:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
            return
        try:
            run(self, *args)
        finally:
            takeover.safely(takeover.leave, left)

    _patches.replace(threading.Thread, "start", start_with_scopes)
    _patches.replace(threading.Thread, "_bootstrap_inner", bootstrap_within)
    _patches.replace(threading.Thread, "_delete", settle_and_delete)
    _patches.replace(futures.ThreadPoolExecutor, "submit", submit_in_scope)
    _patches.replace(futures._WorkItem, "__init__", keep_start)
    _patches.replace(futures._WorkItem, "run", run_within)
    for name in _POOL_METHODS:
        original = _find(multiprocessing.pool.Pool, name)
        _patches.replace(multiprocessing.pool.Pool, name, _in_scope(original))
    scope.inherit = takeover.inherit


def uninstall() -> list[str]:
    """Put Python's own methods back."""
    scope.inherit = scope._inherit_nothing
    takeover.begun.clear()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which threads were there before, what is out of reach, and what went wrong in devguard itself."""
    return {"threads_before": list(_before), "out_of_reach": _OUT_OF_REACH, "failures": list(takeover.failures)}


def _find(owner: Any, name: str) -> Callable[..., Any]:
    original: Callable[..., Any] | None = vars(owner).get(name)
    if original is None:
        version = sys.version.partition(" ")[0]
        where = f"{owner.__module__}.{owner.__qualname__}.{name}"
        raise DoorError(f"{where} is not in Python {version}; this version of devguard does not know it.")
    return original


class _Submitted(threading.local):
    start: Start | None = None


_submitted = _Submitted()


def _plan_thread(thread: threading.Thread) -> Start | None:
    """Decide with what `thread` starts."""
    work: Any = type(thread).run
    if work is threading.Thread.run:
        work = getattr(thread, "_target", None)
        if work is futures._worker or work is multiprocessing.pool.worker:  # type: ignore[attr-defined]
            return takeover.plan_worker()  # it outlives the scope that happens to start it
    elif work is threading.Timer.run:
        work = thread.function  # type: ignore[attr-defined]
    return takeover.plan(work, 0)


def _plan_task(work: Any, pool: Any) -> Start | None:
    """Decide with what a task of `pool` starts."""
    if getattr(pool, "_initializer", pool) is not None:  # Python 3.14 does not say whether there is one
        return takeover.plan(work, None)
    begin = takeover.plan_worker()
    return takeover.plan(work, 0 if begin is None else begin.device)


def _in_scope(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of ``multiprocessing.pool.Pool`` that gives the tasks of a pool of threads their scopes."""

    def method(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if scope.local.stack and isinstance(self, multiprocessing.pool.ThreadPool):
            begin = takeover.safely(_plan_task, func, self)
            if begin is not None:
                func = _Task(func, begin)
        return original(self, func, *args, **kwargs)

    return method


class _Task:
    """A task within the scopes of who submitted it."""

    __slots__ = ("begin", "function")

    def __init__(self, function: Callable[..., Any], begin: Start) -> None:
        self.function = function
        self.begin = begin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        left = takeover.safely(takeover.enter, self.begin)
        try:
            return self.function(*args, **kwargs)
        finally:
            takeover.safely(takeover.leave, left)
