"""What a thread, or a task of a pool, does with what it has taken over: on the thread that runs it.

A thread's device is set at once, by the door ``threads``; its scopes wait until something first asks for them
(`inherit`), which in most threads nothing does. Where the mode leaves it as torch starts it, it is judged as it ends
(`judge_end`), by the context that it has current then. A task enters all of it, and leaves it for the next.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from devguard.doors.concurrency import thread_plan
from devguard.doors.concurrency.thread_plan import ADVICE, NAME, Start, planned, safely
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.ownership import in_force
from devguard.ownership.owner import owned_tags
from devguard.ownership.stack import Stack, judge_pending, local
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite

__all__ = ["at_end", "end", "ended", "enter", "inherit", "leave", "runs"]

_DELETE = "_delete"


def inherit(stack: Stack) -> None:
    """Put the scopes that this thread was started with on its stack, which most threads never need."""
    ident = threading.get_ident()
    waiting = list(threading._limbo)  # type: ignore[attr-defined]
    # Python does not know a thread yet that has just begun; what it knows by the number may be one that is gone
    for thread in (threading._active.get(ident), *waiting):  # type: ignore[attr-defined]
        begin = planned.get(id(thread)) if thread is not None and thread._ident == ident else None
        if begin is not None:
            stack.extend(begin.entries)
            if not begin.observed:
                at_end(thread, settle)
            return


def runs(thread: Any) -> bool:
    """Tell whether a thread has begun to run and has not ended."""
    return threading._active.get(getattr(thread, "_ident", None)) is thread  # type: ignore[attr-defined]


def _forget_threads() -> None:
    """Forget all threads but this one: after a fork there are no others, and their identities come again."""
    mine = id(threading._active.get(threading.get_ident()))  # type: ignore[attr-defined]
    for other in planned.keys() - {mine}:
        del planned[other]


os.register_at_fork(after_in_child=_forget_threads)  # the door `threads` brings this module in as it opens


def at_end(thread: Any, function: Callable[[], None]) -> None:
    """Call `function` on a thread as it ends, while Python still knows it as that: before its ``_delete``."""
    own = vars(thread)  # not by setattr, which its class may have changed

    def end_and_delete() -> None:
        own.pop(_DELETE, None)
        try:
            function()
        finally:
            thread._delete()

    own[_DELETE] = end_and_delete


def ended(thread: Any) -> None:
    """Do what `at_end` wants done if Python has not: 3.10 forgets a thread without calling its ``_delete``."""
    if _DELETE in vars(thread):
        threading._active[threading.get_ident()] = thread  # type: ignore[attr-defined]
        thread._delete()


def enter(begin: Start) -> tuple[int, int, Start | None]:
    """Enter the scopes of a task and set its device.

    Returns
    -------
    tuple of int, int and Start or None
        How deep the stack was, the device to give back, and what `judge_end` is to judge.
    """
    stack = local.stack
    depth = len(stack)
    stack.extend(begin.entries)
    try:
        if begin.origin is None:
            return depth, stack.take(begin.device), None
        if begin.observed and _strayed_to() is None:
            return depth, -1, begin
        # the worker has chosen a device by itself, or a task before has: what this one does cannot be told from that
        return depth, stack.take(begin.device if _may_move(begin.origin) else -1), None
    except Exception:
        del stack[depth:]  # the scopes without their device would promise what is not so
        raise


def _may_move(origin: callsite.Origin) -> bool:
    """Judge a task whose worker chose its device by itself; tell whether it may be moved."""
    owner = in_force.owner()
    if owner is None:
        return False
    current = sys.modules["torch"]._C._cuda_getDevice()
    return current == owner.index or thread_plan.places(owner, current, origin)


def _strayed_to() -> int | None:
    """Return the device whose context this thread has current, if nobody in this process has owned it."""
    device = accelerator.bound_device()
    owner = in_force.owner()  # an adopted one may not have been entered yet
    if device is None or (owner is not None and device == owner.index) or f"cuda:{device}" in owned_tags():
        return None
    return device


def end(begin: Start) -> None:
    """Judge and settle what a thread leaves behind that was left as torch starts it."""
    safely(judge_end, begin)
    settle()


def judge_end(begin: Start) -> None:
    """Judge what was left as torch starts it: a stray, if it has worked on a device that nobody owns, and is there."""
    owner, device = in_force.owner(), _strayed_to()
    if owner is not None and owner.index >= 0 and device is not None:
        with contextlib.suppress(StrayDeviceError, StrayDeviceWarning):  # nobody is there to be told of it
            judge(NAME, f"cuda:{device}", owner, 0, ADVICE, origin=begin.origin, places=True)


def leave(left: tuple[int, int, Start | None] | None) -> None:
    """Leave the scopes of a task, with what it forgot to leave itself, and give its worker's device back."""
    settle()
    if left is not None:
        depth, previous, begin = left
        if begin is not None:
            judge_end(begin)
        stack = local.stack
        del stack[depth:]
        if previous >= 0:
            stack.give_back(previous)


def settle() -> None:
    """Let the door ``set_device`` judge what a thread or a task leaves behind; nobody is there to be told of it."""
    stack = local.stack
    if stack.changes:
        with contextlib.suppress(StrayDeviceWarning):
            safely(functools.partial(judge_pending, stack, leaving=True, failing=True))
