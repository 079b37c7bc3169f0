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

import functools
import inspect
import multiprocessing.pool
import operator
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread as futures
from types import FunctionType
from typing import Any

from devguard.doors.concurrency import thread_plan, thread_run
from devguard.doors.concurrency.thread_plan import Start
from devguard.ownership.process import process
from devguard.ownership.stack import inherit_with, local
from devguard.reporting.journal import journal
from devguard.support.patching import DoorError, Patches

__all__ = ["install", "status", "uninstall"]

NAME = "threads"

_patches = Patches()
_before: list[str] = []
_OUT_OF_REACH = "threads that ran before the door opened, _thread.start_new_thread, threads of C++ code"
_INTERPRETERS = "InterpreterPoolExecutor"  # Python 3.14
_POOL_METHODS = ("apply_async", "_map_async", "imap", "imap_unordered")


def install() -> None:
    """Hook the start and end of threads, and the tasks of pools."""
    import torch

    thread_plan.failures.clear()
    known = (threading.main_thread(), threading.current_thread())
    _before[:] = sorted(thread.name for thread in threading.enumerate() if thread not in known)
    start, bootstrap, _ = (_find(threading.Thread, name) for name in ("start", "_bootstrap_inner", "_delete"))
    submit, run = _find(futures.ThreadPoolExecutor, "submit"), _find(futures._WorkItem, "run")
    work_of = _work_of(futures._WorkItem)
    planned, grow, get_frame = thread_plan.planned, journal.grow, sys._getframe
    limbo = threading._limbo  # type: ignore[attr-defined]
    forgets = sys.version_info < (3, 11)  # looking at the names of each thread costs
    set_device: Any = getattr(torch._C, "_cuda_setDevice", None)
    set_device = getattr(set_device, "__wrapped__", set_device)  # devguard's own change is nobody's to judge

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
            known = stack.starts.get(key)  # a thread is started with cold caches, where every object counts
            if (
                known is not None
                and known[1] is (stack[-1] if stack else None)
                and known[2] is process.era
                and stack.judged is not None
                and not stack.changes
            ):
                begin, _, _, recorded, _ = known
                if recorded is not None:  # as verdict.judge does it
                    _, tally, row = recorded
                    if tally is None:
                        grow(row, 0)
                    else:
                        tally.count += 1
            else:
                begin = thread_plan.safely(thread_plan.plan_thread, self, key, code)
            if begin is not None and ident is None:
                planned[id(self)] = begin
                try:
                    start(self)
                except BaseException:  # perhaps only the waiting for it was interrupted
                    if self not in limbo and not thread_run.runs(self):
                        planned.pop(id(self), None)
                    raise
                return
        start(self)

    def bootstrap_within(self: Any) -> None:
        begin = planned.get(id(self))
        if begin is None:
            bootstrap(self)
            return
        if begin.observed:
            thread_plan.safely(thread_run.at_end, self, functools.partial(thread_run.end, begin))
        elif begin.device >= 0:
            try:
                set_device(begin.device)
            except Exception as error:  # noqa: BLE001 - as thread_plan.safely does it
                thread_plan.note(error)
        try:
            bootstrap(self)
        finally:
            if forgets:
                thread_run.ended(self)
            planned.pop(id(self), None)

    def submit_in_scope(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            fn = _task(fn, self)  # before the pool takes its locks
        return submit(self, fn, *args, **kwargs)

    def run_and_leave(self: Any, *args: Any) -> None:
        task = work_of(self)
        if type(task) is not _Task or task.begin is None or task.begin.observed:
            run(self, *args)
            return
        task.leaves = False
        try:
            run(self, *args)
        finally:
            if task.left is not None:
                thread_plan.safely(thread_run.leave, task.left)

    _patches.replace(threading.Thread, "start", start_with_scopes)
    _patches.replace(threading.Thread, "_bootstrap_inner", bootstrap_within)
    _patches.replace(futures.ThreadPoolExecutor, "submit", submit_in_scope)
    _patches.replace(futures._WorkItem, "run", run_and_leave)
    for name in _POOL_METHODS:
        original = _find(multiprocessing.pool.Pool, name)
        _patches.replace(multiprocessing.pool.Pool, name, _in_scope(original))
    inherit_with(thread_run.inherit)


def uninstall() -> list[str]:
    """Put Python's own methods back."""
    inherit_with(None)
    thread_plan.planned.clear()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which threads were there before, what is out of reach, and what went wrong in devguard itself."""
    return {"threads_before": list(_before), "out_of_reach": _OUT_OF_REACH, "failures": list(thread_plan.failures)}


def _unknown(what: str, whether: str) -> DoorError:
    version = sys.version.partition(" ")[0]
    return DoorError(f"{what} {whether} Python {version}; this version of devguard does not know it.")


def _find(owner: Any, name: str) -> Callable[..., Any]:
    original: Callable[..., Any] | None = vars(owner).get(name)
    if original is None:
        raise _unknown(f"{owner.__module__}.{owner.__qualname__}.{name}", "is not in")
    return original


def _work_of(item: type) -> Callable[[Any], Any]:
    """Return what gets the function out of an item of an executor's queue."""
    parameters = inspect.signature(item).parameters
    if "fn" in parameters:
        return operator.attrgetter("fn")
    if "task" in parameters:  # Python 3.14: with its arguments
        return lambda item: item.task[0]
    raise _unknown(f"{item.__module__}.{item.__qualname__}({', '.join(parameters)})", "is in")


def _task(work: Any, pool: Any) -> Any:
    """Return `work` as a task of `pool`: in the scopes of this thread, if it has any, and settled at its end."""
    if _INTERPRETERS in [base.__name__ for base in type(pool).__mro__]:
        return work  # it would have to be pickled, and the other interpreter has a devguard of its own
    return _Task(work, thread_plan.safely(_plan_task, work, pool) if local.stack else None)


def _plan_task(work: Any, pool: Any) -> Start | None:
    """Decide with what a task of `pool` starts."""
    if getattr(pool, "_initializer", pool) is not None:  # Python 3.14 does not say whether there is one
        return thread_plan.plan(work, None)
    begin = thread_plan.plan_worker()
    return thread_plan.plan(work, 0 if begin is None else begin.device)


def _in_scope(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of ``multiprocessing.pool.Pool`` that gives the tasks of a pool of threads their scopes."""

    def method(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        guarded = local.stack or process.owner is not None
        if guarded and isinstance(self, multiprocessing.pool.ThreadPool):
            func = _task(func, self)
        return original(self, func, *args, **kwargs)

    return method


class _Task:
    """A task within the scopes of who submitted it.

    Attributes
    ----------
    begin : Start or None
        The scopes; None for a task that was submitted outside of any.
    leaves : bool
        Whether it leaves them by itself. The worker of an executor leaves them after the callbacks of the future,
        unless the task is only observed: that is judged before its result is known.
    left : tuple or None
        What it left to the worker.
    """

    __slots__ = ("begin", "function", "leaves", "left")

    def __init__(self, function: Callable[..., Any], begin: Start | None) -> None:
        self.function = function
        self.begin = begin
        self.leaves = True
        self.left: tuple[int, int, Start | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        left = None if self.begin is None else thread_plan.safely(thread_run.enter, self.begin)
        if not self.leaves:
            self.left = left
            return self.function(*args, **kwargs)
        try:
            return self.function(*args, **kwargs)
        finally:
            thread_plan.safely(thread_run.leave, left)
