"""The door ``threads``: a Python thread starts with the scopes of the code that starts it, on the owner's device.

torch starts every thread on device 0. Here a thread takes over the scopes in force when ``start()`` is called, and a
task of a pool those in force when it is submitted. When a thread starts, it is unknown whether it will use a GPU. So
the thread is *placed*, which is no stray; the mode ``error`` refuses it only where it is set for this door by name.

Out of reach: threads that ran before the door opened, ``_thread.start_new_thread``, and threads of C++ code. See
docs/doors.md, and thread_plan.py and thread_run.py for the two halves of a start.
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
from devguard.doors.concurrency.thread_plan import Start, failures
from devguard.ownership.process import process
from devguard.ownership.stack import inherit_with, local
from devguard.reporting.verdict import count_repeat
from devguard.support import accelerator
from devguard.support.patching import Patches, unsupported

__all__ = ["install", "status", "uninstall"]

_patches = Patches()
_before: list[str] = []
_OUT_OF_REACH = "threads that ran before the door opened, _thread.start_new_thread, threads of C++ code"
_INTERPRETERS = "InterpreterPoolExecutor"  # Python 3.14
_POOL_METHODS = ("apply_async", "_map_async", "imap", "imap_unordered")


def install() -> None:
    """Patch the start and end of threads, and the tasks of pools."""
    failures.clear()
    known = (threading.main_thread(), threading.current_thread())
    _before[:] = sorted(thread.name for thread in threading.enumerate() if thread not in known)
    _patch_thread()
    _patch_executor()
    _patch_pool()
    inherit_with(thread_run.inherit)


def uninstall() -> list[str]:
    """Put Python's own methods back."""
    inherit_with(None)
    thread_plan.planned.clear()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which threads ran before the door opened, what is out of reach, and errors inside devguard."""
    return {"threads_before": list(_before), "out_of_reach": _OUT_OF_REACH, "failures": list(failures)}


def _patch_thread() -> None:
    """Patch ``threading.Thread``: plan a thread where it is started, and set its device where it begins to run."""
    thread = threading.Thread
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
            known = stack.starts.get(key)  # a thread is started with cold caches, where every object counts
            if (
                known is not None
                and known[1] is (stack[-1] if stack else None)
                and known[2] is process.era
                and stack.judged is not None
                and not stack.changes
            ):
                plan, _, _, repeat, _ = known
                if repeat is not None:
                    count_repeat(repeat, 0)
            else:
                plan = failures.safely(thread_plan.plan_thread, self, key, code)
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

    _patches.replace(thread, "start", start_with_scopes)
    _patches.replace(thread, "_bootstrap_inner", bootstrap_within)


def _patch_executor() -> None:
    """Patch ``ThreadPoolExecutor``: a task runs within the scopes of the code that submitted it.

    ``asyncio.to_thread`` and ``run_in_executor`` submit to one.
    """
    submit, run = _patches.find(futures.ThreadPoolExecutor, "submit"), _patches.find(futures._WorkItem, "run")
    function_of = _function_of(futures._WorkItem)

    def submit_in_scope(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            fn = _task(fn, self)  # before the pool takes its locks
        return submit(self, fn, *args, **kwargs)

    def run_and_leave(self: Any, *args: Any) -> None:
        task = function_of(self)
        if type(task) is not _Task or task.start is None or task.start.observed:
            run(self, *args)
            return
        task.leaves = False
        try:
            run(self, *args)
        finally:
            if task.left is not None:
                failures.safely(thread_run.leave, task.left)

    _patches.replace(futures.ThreadPoolExecutor, "submit", submit_in_scope)
    _patches.replace(futures._WorkItem, "run", run_and_leave)


def _function_of(item: type) -> Callable[[Any], Any]:
    """Return a function that returns the task's function from an item of an executor's queue."""
    parameters = inspect.signature(item).parameters
    if "fn" in parameters:
        return operator.attrgetter("fn")
    if "task" in parameters:  # Python 3.14: the function with its arguments
        return lambda item: item.task[0]
    raise unsupported("concurrent.futures.thread._WorkItem", f"has other parameters there, {', '.join(parameters)}")


def _patch_pool() -> None:
    """Patch ``multiprocessing.pool``: the tasks of a pool of threads, as those of an executor."""
    for name in _POOL_METHODS:
        original = _patches.find(multiprocessing.pool.Pool, name)
        _patches.replace(multiprocessing.pool.Pool, name, _in_scope(original))


def _in_scope(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of ``multiprocessing.pool.Pool`` that gives the tasks of a pool of threads their scopes."""

    def method(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        is_guarded = local.stack or process.owner is not None
        if is_guarded and isinstance(self, multiprocessing.pool.ThreadPool):
            func = _task(func, self)
        return original(self, func, *args, **kwargs)

    return method


def _task(function: Any, pool: Any) -> Any:
    """Return `function` as a task of `pool`, which runs within the scopes of this thread."""
    if _INTERPRETERS in [base.__name__ for base in type(pool).__mro__]:
        return function  # the task would have to be pickled, and the other interpreter has its own devguard
    return _Task(function, failures.safely(_plan_task, function, pool) if local.stack else None)


def _plan_task(function: Any, pool: Any) -> Start | None:
    """Plan the start of a task of `pool`."""
    if getattr(pool, "_initializer", pool) is not None:  # Python 3.14 hides whether there is an initializer
        return thread_plan.plan(function, None)
    worker = thread_plan.plan_worker()
    return thread_plan.plan(function, 0 if worker is None else worker.device)


class _Task:
    """A task within the scopes of the code that submitted it.

    Attributes
    ----------
    start : Start or None
        The scopes; None for a task that was submitted outside every scope.
    leaves : bool
        Whether the task leaves them. An executor's worker leaves them instead, after the callbacks of the future,
        unless the task is only observed: that must be judged before its result is known.
    left : tuple or None
        What `thread_run.leave` needs.
    """

    __slots__ = ("function", "leaves", "left", "start")

    def __init__(self, function: Callable[..., Any], start: Start | None) -> None:
        self.function = function
        self.start = start
        self.leaves = True
        self.left: tuple[int, int, Start | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        left = None if self.start is None else failures.safely(thread_run.enter, self.start)
        if not self.leaves:
            self.left = left
            return self.function(*args, **kwargs)
        try:
            return self.function(*args, **kwargs)
        finally:
            failures.safely(thread_run.leave, left)
