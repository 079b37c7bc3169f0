"""How a thread, or a task of a pool, runs with what it took over; for the door ``threads``.

The device of a thread is set at once, by the door. Its scopes are put on its stack when code first asks for them
(`inherit`), which most threads never do. Work that is only observed is judged when it ends (`judge_end`), by the
context that is current then. A task enters its scopes and leaves them for the worker's next task.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from devguard.doors.concurrency import thread_plan
from devguard.doors.concurrency.thread_plan import ADVICE, NAME, Start, failures, planned
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.stack import Stack, judge_pending, local
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite

__all__ = ["call_at_end", "call_forgotten", "end", "enter", "inherit", "is_running", "leave", "take_over"]

_DELETE = "_delete"


def inherit(stack: Stack) -> None:
    """Put the scopes that this thread was started with on its stack."""
    ident = threading.get_ident()
    waiting = list(threading._limbo)  # type: ignore[attr-defined]
    # Python does not know a thread yet that has just started, and a thread under the same number may have ended.
    for thread in (threading._active.get(ident), *waiting):  # type: ignore[attr-defined]
        start = planned.get(id(thread)) if thread is not None and thread._ident == ident else None
        if start is not None:
            take_over(thread, start, stack)
            return


def take_over(thread: Any, start: Start, stack: Stack) -> None:
    """Put the scopes that a thread was started with on its stack, unless they lie there."""
    if stack.inherited is start:
        return
    stack[:], stack.inherited = start.entries, start
    stack.take(-1)  # greenlets are watched from now on
    if not start.observed:
        call_at_end(thread, judge_leftovers)


def is_running(thread: Any) -> bool:
    """Return whether a thread runs."""
    return threading._active.get(getattr(thread, "_ident", None)) is thread  # type: ignore[attr-defined]


def _forget_threads() -> None:
    """Forget all threads but this one: a forked child has no others, and their identities are used again."""
    this = id(threading._active.get(threading.get_ident()))  # type: ignore[attr-defined]
    for other in planned.keys() - {this}:
        del planned[other]


os.register_at_fork(after_in_child=_forget_threads)  # this module is imported when the door `threads` opens


def call_at_end(thread: Any, function: Callable[[], None]) -> None:
    """Call `function` on a thread when the thread ends, just before Python forgets it (``Thread._delete``)."""
    own = vars(thread)  # not setattr, which the thread's class may override

    def end_and_delete() -> None:
        own.pop(_DELETE, None)
        try:
            function()
        finally:
            thread._delete()

    own[_DELETE] = end_and_delete


def call_forgotten(thread: Any) -> None:
    """Call what `call_at_end` registered, if Python has not: 3.10 forgets a thread without calling ``_delete``."""
    if _DELETE in vars(thread):
        threading._active[threading.get_ident()] = thread  # type: ignore[attr-defined]
        thread._delete()


# What `leave` needs: the start, the device to give back (-1: none), whether to judge the end of the task, the task
# around this one, and what `_hide` returned (None: nothing was hidden).
Left = tuple[Start, int, bool, "Start | None", Any]


def enter(start: Start) -> Left:
    """Enter the scopes of a task, in place of those of its worker, and set its device."""
    stack = local.stack
    hidden = _hide(stack) if stack and (start.entries or start.hides) else None
    outer, stack.task = stack.task, start
    try:
        stack.extend(start.entries)
        if start.origin is None:
            device = stack.read() if start.restores else stack.take(start.device)
            return start, device, False, outer, hidden
        if start.observed and _strayed_to() is None:
            return start, -1, True, outer, hidden
        # The worker, or an earlier task, chose a device: the context at the end says nothing about this task.
        device = stack.take(start.device if _may_move(start.origin) else -1)
        return start, device, False, outer, hidden
    except Exception:  # without their device the scopes would be wrong
        _end(stack, start, outer, hidden)
        raise


def leave(left: Left | None) -> None:
    """Leave the scopes of a task, and those that it did not leave itself, and give the worker's device back."""
    stack = local.stack
    if stack.changes:
        judge_leftovers()
    if left is not None:
        start, device, is_judged, outer, hidden = left
        if is_judged:
            judge_end(start)
        _end(stack, start, outer, hidden)
        if start.restores:
            stack.restore(device)
        else:
            stack.give_back(device)


def _hide(stack: Stack) -> tuple[Any, ...]:
    """Take all entries off the stack of a worker; return what `_end` needs."""
    own = tuple(stack), stack.hidden, stack.changes
    stack.hidden += own[0]
    stack.clear()
    stack.changes = []
    return own


def _end(stack: Stack, start: Start, outer: Start | None, hidden: tuple[Any, ...] | None) -> None:
    """Remove the entries of a task, and put those of its worker back."""
    stack.task = outer
    if hidden is not None:
        stack[:], stack.hidden, stack.changes = hidden
        stack.judged = None
    elif start.entries or start.hides:
        stack.clear()


def _may_move(origin: callsite.Origin) -> bool:
    """Judge a task of a worker that selected its device; return whether the task may be moved."""
    owner = in_force.owner()
    if owner is None:
        return False
    current = accelerator.current_device()
    return current == owner.index or thread_plan.judge_placement(owner, current, origin)


def _strayed_to() -> int | None:
    """Return the device of this thread's current context, if that device was never owned in this process."""
    device = accelerator.bound_device()
    owner = in_force.owner()  # an adopted owner may not have been entered yet
    if device is None or (owner is not None and device == owner.index) or f"cuda:{device}" in owned_tags():
        return None
    return device


def end(start: Start) -> None:
    """Judge a thread that was only observed, and the device changes that it did not undo."""
    failures.safely(judge_end, start)
    judge_leftovers()


def judge_end(start: Start) -> None:
    """Judge work that was only observed: a stray, if the context of a device that is not owned is current now."""
    owner, device = in_force.owner(), _strayed_to()
    if owner is not None and owner.index >= 0 and device is not None:
        with contextlib.suppress(StrayDeviceError, StrayDeviceWarning):  # no code is left that could catch them
            judge(NAME, f"cuda:{device}", owner, 0, ADVICE, origin=start.origin, places=True)


def judge_leftovers() -> None:
    """Judge the device changes that a thread or a task did not undo; no code is left that could catch an error."""
    stack = local.stack
    if stack.changes:
        with contextlib.suppress(StrayDeviceWarning):
            failures.safely(functools.partial(judge_pending, stack, leaving=True, failing=True))
