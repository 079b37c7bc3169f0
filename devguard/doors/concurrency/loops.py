"""Work that is handed to the thread of an event loop or of a server; for the door ``threads``.

A callback, or each step of a coroutine, runs within the scopes of the code that hands it over, and within none if that
code has none. A coroutine holds them only while it runs, as under ``guard(...).run()``. A thread that only serves
others (``run_forever``, ``serve_forever``, a portal of anyio) falls back, as in handover.py; a thread that runs a
coroutine of the user to its end keeps its scopes.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import socketserver
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any

from devguard.doors.concurrency import handover, thread_plan, thread_run
from devguard.doors.concurrency.pools import Replacement, Task
from devguard.doors.concurrency.thread_plan import Start, failures
from devguard.ownership.stack import Entry, local
from devguard.support import accelerator, callsite
from devguard.support.patching import Patches

__all__ = ["call_soon_threadsafe", "callback_within", "handed_over", "replacements", "step_within"]

_CALLBACK = "run_coroutine_threadsafe.<locals>.callback"  # holds the coroutine in its variable `coro`


def replacements(patches: Patches) -> Iterator[Replacement]:
    """Yield what replaces the methods of loops and servers; raise `DoorError` if this Python lacks one."""
    loop, server = asyncio.BaseEventLoop, socketserver.BaseServer
    yield loop, "call_soon_threadsafe", call_soon_threadsafe(patches.find(loop, "call_soon_threadsafe"))
    yield loop, "run_forever", _serving(patches.find(loop, "run_forever"))
    name = "_handle_request_noblock"
    yield server, name, handover.falling_back(patches.find(server, name))


def handed_over(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function within the scopes of this thread; if it returns an awaitable, so are the steps of that."""
    start = failures.safely(thread_plan.plan_quietly)
    called = _within(start, function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = called(*args, **kwargs)
        return step_within(start, result) if inspect.isawaitable(result) else result

    return call


def callback_within(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function within the scopes of this thread; whatever it returns stays as it is."""
    return _within(failures.safely(thread_plan.plan_quietly), function)


def _within(start: Start | None, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        left = failures.safely(_enter, start)
        try:
            return function(*args, **kwargs)
        finally:
            failures.safely(thread_run.leave, left)

    return call


def call_soon_threadsafe(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loop's method of this name; callbacks of the standard library need no scope."""
    is_finalizing = sys.is_finalizing  # at the end of Python, this module loses its names

    def call_soon(self: Any, callback: Any, *args: Any, **kwargs: Any) -> Any:
        if is_finalizing() or asyncio._get_running_loop() is self:
            return original(self, callback, *args, **kwargs)
        steps: list[Any] = []
        args = tuple([_stepped(each, steps) if inspect.iscoroutine(each) else each for each in args])
        cell = _cell_of_coroutine(callback)
        if cell is not None:
            coroutine = cell.cell_contents
            cell.cell_contents = _stepped(coroutine, steps)
        elif _is_of_user(callback):
            callback = callback_within(callback)
        try:
            return original(self, callback, *args, **kwargs)
        except BaseException:
            for each in steps:
                each.close()  # so that Python does not warn of it
            if cell is not None:
                cell.cell_contents = coroutine
            raise

    return call_soon


def _is_of_user(callback: Any) -> bool:
    """Return whether a callback needs scopes; the loop refuses a function of coroutines."""
    is_task = type(callback) is Task
    return not is_task and callsite.has_user_code(callback) and not inspect.iscoroutinefunction(callback)


def _cell_of_coroutine(callback: Any) -> Any:
    """Return the cell that holds the coroutine given to ``run_coroutine_threadsafe``, through an early copy too."""
    if getattr(callback, "__qualname__", None) != _CALLBACK or callback.__module__ != "asyncio.tasks":
        return None
    variables = dict(zip(callback.__code__.co_freevars, callback.__closure__, strict=True))
    return variables.get("coro")


def _stepped(coroutine: Any, steps: list[Any]) -> Any:
    """Return a coroutine with its steps in the scopes of this thread, and append it to `steps`."""
    stepped = step_within(failures.safely(thread_plan.plan_quietly), coroutine)
    for name in ("__name__", "__qualname__"):
        setattr(stepped, name, getattr(coroutine, name, "step_within"))
    steps.append(stepped)
    return stepped


def _serving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run_forever``: a thread that only serves others looks before each round of callbacks at its scopes."""
    until_complete = getattr(asyncio.BaseEventLoop.run_until_complete, "__code__", None)

    def run_forever(self: Any) -> Any:
        own = vars(self)
        is_for_user = sys._getframe(1).f_code is until_complete and _runs_user_code(threading.current_thread())
        if local.stack.inherited is None or is_for_user or "_process_events" in own:
            return original(self)
        own["_process_events"] = handover.falling_back(self._process_events)
        try:
            return original(self)
        finally:
            del own["_process_events"]

    return run_forever


def _runs_user_code(thread: threading.Thread) -> bool:
    """Return whether a thread was started for a function, or a coroutine, of the user."""
    work = getattr(thread, "_target", None) or type(thread).run
    given = (work, *getattr(thread, "_args", ()), *getattr(thread, "_kwargs", {}).values())
    return any(inspect.iscoroutine(each) or callsite.has_user_code(each) for each in given)


def _enter(start: Start | None) -> thread_run.Left | None:
    """Enter the scopes of the code that handed work over; None stands for code without any."""
    start = start or _outside()
    if start is None:
        return None
    left = thread_run.enter(start)
    if start.hides and start.device >= 0:
        accelerator.bind().back(start.device)  # opens no context
    return left


def _outside() -> Start | None:
    """Return what hides the scopes that this thread, or the task that it runs, took over; None if there are none."""
    stack = local.stack
    own: Start | None = stack.task or stack.inherited
    if own is None or not stack or len(stack) != len(own.entries):
        return None  # the thread entered a scope itself
    device = handover.device_of(())
    if own.device < 0 or device < 0 or accelerator.current_device() != own.device:
        device = -1  # the thread chose its device itself
    return Start((), device, restores=True, hides=True)


async def step_within(start: Start | None, awaitable: Any) -> Any:
    """Await `awaitable`; each of its steps runs in the scopes of `start`, which are left while it is suspended."""
    start = start or failures.safely(_outside)
    if start is None:
        return await awaitable
    return await _steps(start, awaitable if hasattr(awaitable, "send") else _awaiting(awaitable))


async def _awaiting(awaitable: Any) -> Any:
    """Await `awaitable`; its iterator may lack `send` and `throw`."""
    return await awaitable


@types.coroutine
def _steps(start: Start, inner: Any) -> Generator[Any, Any, Any]:
    held: list[Entry] = []
    device = -1  # the device that the code has made current, where it is not the one of its scopes
    resume, value = inner.send, None
    while True:
        left = failures.safely(_enter, start)
        stack = local.stack
        depth, own = len(stack), stack.read()
        if held:
            stack.extend(held)
            stack.judged = None
        if device >= 0:
            accelerator.bind().to(device)
        try:
            yielded = resume(value)
        except StopIteration as done:
            return done.value
        finally:
            held, device = stack[depth:], stack.read()
            device = -1 if device == own else device
            if held and stack.changes:  # suspended code may still undo them
                stack.changes = [change for change in stack.changes if change.depth <= depth]
            failures.safely(thread_run.leave, left)
        try:
            value = yield yielded
            resume = inner.send
        except BaseException as error:  # noqa: BLE001 - whatever is thrown in belongs to the coroutine
            resume, value = inner.throw, error
