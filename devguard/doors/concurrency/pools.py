"""The tasks of the standard library's pools of threads; for the door ``threads``.

A task runs within the scopes of the code that submitted it, whichever thread runs it: on ``ThreadPoolExecutor``, which
``asyncio.to_thread`` and ``run_in_executor`` use, and on ``multiprocessing.pool.ThreadPool``. So do callbacks of their
futures and results, initializers, and the iterables that ``imap`` reads on a thread of the pool. The device and the
scopes of the worker are as before afterwards; only an initializer may choose them.
"""

from __future__ import annotations

import asyncio
import asyncio.threads
import functools
import inspect
import multiprocessing.pool
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import thread
from types import FrameType
from typing import Any

from devguard.doors.concurrency import thread_plan, thread_run
from devguard.doors.concurrency.thread_plan import Start, failures
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.support import accelerator, callsite
from devguard.support.patching import Patches, unsupported

__all__ = ["mark_coroutine_function", "quiet_task", "replacements", "Replacement", "task", "Task"]

_INTERPRETERS = "InterpreterPoolExecutor"  # Python 3.14

_NOTHING = Start((), -1)  # a task that takes over nothing

Replacement = tuple[Any, str, Any]  # the owner of an attribute, its name, and what replaces its value


def replacements(patches: Patches) -> Iterator[Replacement]:
    """Yield what replaces the methods of the pools; raise `DoorError` if this Python lacks one."""
    yield from _executor(patches)
    yield from _pool(patches)
    yield from _to_thread(patches)


class Task:
    """A task within the scopes of the code that submitted it."""

    __slots__ = ("function", "start")

    def __init__(self, function: Callable[..., Any], start: Start | None) -> None:
        self.function = function
        self.start = start

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        left = None if self.start is None else failures.safely(thread_run.enter, self.start)
        try:
            return self.function(*args, **kwargs)
        finally:
            failures.safely(thread_run.leave, left)


class _Initializer(Task):
    """An initializer of a pool: the device and the scopes that it chooses stay those of the worker."""

    __slots__ = ()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        start, stack = self.start, local.stack
        assert start is not None
        left = failures.safely(thread_run.enter, start)
        stack.selected = False
        try:
            return self.function(*args, **kwargs)
        finally:
            failures.safely(self._leave, start, left)

    @staticmethod
    def _leave(start: Start, left: thread_run.Left | None) -> None:
        if left is None:
            return
        stack = local.stack
        own = stack[len(start.entries) :]
        current = accelerator.current_device() if start.device >= 0 else -1
        is_chosen = stack.selected or current != start.device
        stack.changes.clear()  # the choice of a device is what an initializer is for
        thread_run.leave(left)
        stack.extend(own)
        if is_chosen and current >= 0:
            stack.give_back(current)


def task(function: Any, pool: Any) -> Any:
    """Return `function` as a task of `pool`, which runs within the scopes of this thread.

    Parameters
    ----------
    function : callable
        The function; a `Task` is returned as it is.
    pool : object
        The pool. The device of its workers is unknown if it has an initializer.
    """
    if type(function) is Task or (type(function) is functools.partial and Task in map(type, function.args[:1])):
        return function  # asyncio.to_thread submits a partial object
    stack, caller, code = local.stack, sys._getframe(2), getattr(function, "__code__", None)
    key = None if code is None else (type(pool), id(code), id(caller.f_code), caller.f_lasti)
    start = thread_plan.recall(stack, key) if stack else None
    if start is None or getattr(pool, "_initializer", None) is not None:
        if _is_of_interpreters(pool):
            return function  # the task would have to be pickled, and the other interpreter has its own devguard
        start = failures.safely(_plan, function, pool, key, caller)
    return Task(function, start)


def _plan(function: Any, pool: Any, key: Any, caller: FrameType) -> Start | None:
    """Plan the start of a task of `pool`, and remember it under `key`."""
    start, default = None, None
    if local.stack:
        if getattr(pool, "_initializer", pool) is None:  # Python 3.14 hides whether there is an initializer
            worker = thread_plan.plan_worker()
            default = 0 if worker is None else worker.device
        start = thread_plan.plan(function, default)
    start = thread_plan.at_site(start or _NOTHING, function, caller)
    if default is not None:
        thread_plan.keep(key, start, function, getattr(function, "__code__", None), default)
    return None if start is _NOTHING else start


def quiet_task(function: Any, kind: type[Task] | None = None) -> Any:
    """Return a callback or an initializer within the scopes of this thread; it is placed without a record."""
    start = failures.safely(thread_plan.plan_quietly) if callable(function) and type(function) is not Task else None
    return function if start is None else (kind or Task)(function, start)


def _is_of_interpreters(pool: Any) -> bool:
    return _INTERPRETERS in [base.__name__ for base in type(pool).__mro__]


def _executor(patches: Patches) -> Iterator[Replacement]:
    """Replace the methods of ``ThreadPoolExecutor``, of its items of work, and of futures."""
    executor, item = thread.ThreadPoolExecutor, thread._WorkItem
    make, submit = patches.find(executor, "__init__"), patches.find(executor, "submit")
    make_item = patches.find(item, "__init__")
    add = patches.find(futures.Future, "add_done_callback")
    get, put = _access_to_function(item)
    own_code = getattr(submit, "__code__", None)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if local.stack and not _is_of_interpreters(self):
            args, kwargs = _with_initializer(args, kwargs, 2)
        make(self, *args, **kwargs)

    def submit_in_scope(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            fn = task(fn, self)  # before the pool takes its locks
        return submit(self, fn, *args, **kwargs)

    def init_item(self: Any, *args: Any, **kwargs: Any) -> None:
        make_item(self, *args, **kwargs)
        if sys._getframe(1).f_code is not own_code and (local.stack or process.owner is not None):
            put(self, task(get(self), None))  # a subclass with a `submit` of its own

    def add_done_callback(self: Any, fn: Any) -> None:
        add(self, quiet_task(fn) if local.stack and callsite.runs_user_code(fn) else fn)

    yield executor, "__init__", init
    yield executor, "submit", submit_in_scope
    yield item, "__init__", init_item
    yield futures.Future, "add_done_callback", add_done_callback


def _access_to_function(item: type) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    """Return two functions: one returns the task's function from an item of an executor's queue, the other sets it."""
    parameters = inspect.signature(item).parameters
    if "fn" in parameters:
        return operator.attrgetter("fn"), lambda item, function: setattr(item, "fn", function)
    if "task" in parameters:  # Python 3.14: the function with its arguments
        return lambda item: item.task[0], lambda item, function: setattr(item, "task", (function, *item.task[1:]))
    raise unsupported("concurrent.futures.thread._WorkItem", f"has other parameters there, {', '.join(parameters)}")


def _with_initializer(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> tuple[Any, Any]:
    """Return the arguments of a pool's constructor, its initializer within the scopes of this thread."""
    if len(args) > position:
        return (*args[:position], quiet_task(args[position], _Initializer), *args[position + 1 :]), kwargs
    if "initializer" in kwargs:
        return args, {**kwargs, "initializer": quiet_task(kwargs["initializer"], _Initializer)}
    return args, kwargs


def _pool(patches: Patches) -> Iterator[Replacement]:
    """Replace the methods of ``multiprocessing.pool``: the tasks of threads, and the callbacks of every pool."""
    pool, threads = multiprocessing.pool.Pool, multiprocessing.pool.ThreadPool
    make = patches.find(threads, "__init__")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if local.stack:
            args, kwargs = _with_initializer(args, kwargs, 1)
        make(self, *args, **kwargs)

    yield threads, "__init__", init
    for name in ("apply_async", "_map_async"):
        yield pool, name, _with_callbacks(patches.find(pool, name))
    for name in ("imap", "imap_unordered"):
        yield pool, name, _with_iterable(patches.find(pool, name))


def _with_callbacks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of ``Pool`` that gives its function and its callbacks their scopes."""
    names = list(inspect.signature(original).parameters)
    at = [names.index(name) - 2 for name in ("callback", "error_callback")]  # after self and func

    def method(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            args = tuple([quiet_task(value) if index in at else value for index, value in enumerate(args)])
            kwargs = {name: quiet_task(value) if "callback" in name else value for name, value in kwargs.items()}
            if isinstance(self, multiprocessing.pool.ThreadPool):
                func = task(func, self)
        return original(self, func, *args, **kwargs)

    return method


def _with_iterable(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of ``Pool`` that gives its function, and the iterable that another thread reads, their scopes."""

    def method(self: Any, func: Any, iterable: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            if not hasattr(iterable, "__len__"):  # what a generator yields comes from code of the user
                step = quiet_task(iter(iterable).__next__)
                iterable = _items(step)
            if isinstance(self, multiprocessing.pool.ThreadPool):
                func = task(func, self)
        return original(self, func, iterable, *args, **kwargs)

    return method


def _items(step: Callable[[], Any]) -> Iterator[Any]:
    """Yield what `step` returns until it raises StopIteration."""
    while True:
        try:
            item = step()
        except StopIteration:
            return
        yield item


def _to_thread(patches: Patches) -> Iterator[Replacement]:
    """Replace ``asyncio.to_thread``: its coroutine may be awaited elsewhere, and later."""
    for module in (asyncio.threads, asyncio):
        yield module, "to_thread", _submitting(patches.find(module, "to_thread"))


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_thread(func: Any, /, *args: Any, **kwargs: Any) -> Any:
        if local.stack or process.owner is not None:
            func = task(func, None)
        return original(func, *args, **kwargs)

    return mark_coroutine_function(to_thread)


def mark_coroutine_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that returns a coroutine, as far as this Python can."""
    mark = getattr(inspect, "markcoroutinefunction", None)  # Python 3.12
    if mark is not None:
        mark(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return function
