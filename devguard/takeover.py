"""What a thread, or a task of a pool, takes over from whoever started it; for the door ``threads``.

It is planned on the thread that starts it and entered on the thread that runs it. A thread's device is set at once; its
scopes wait until something first asks for them (`inherit`), which in most threads nothing does. Where the mode leaves
it as torch starts it, it is judged as it ends (`judge_end`), by the context that it has current then.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.pool
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread as futures
from dataclasses import dataclass
from typing import Any

from devguard import accelerator, callsite, owners, scope
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.journal import MAX_ROWS
from devguard.owners import Owner
from devguard.scopes import Scope
from devguard.verdict import judge, judged_here

__all__ = [
    "Inherited",
    "Start",
    "at_end",
    "ended",
    "enter",
    "failures",
    "forget_threads",
    "inherit",
    "leave",
    "note",
    "plan",
    "plan_thread",
    "plan_worker",
    "planned",
    "runs",
    "safely",
    "settle",
]

NAME = "threads"  # the door

failures: list[str] = []
_ADVICE = (
    "A new thread starts on device 0. Decorate its function with devguard.guard(...), give a pool an initializer that "
    "sets the device, or let devguard set it (mode='repair', or doors={'threads': 'repair'})."
)


class Inherited(Scope):
    """A scope that was taken over: it says what the original says, and is not for this thread to leave."""

    __slots__ = ("asks_for", "mode_of", "names")

    def __init__(self, original: Scope) -> None:
        self.mode_of = original.mode_of  # type: ignore[method-assign]
        self.asks_for = original.asks_for  # type: ignore[method-assign]
        self.names = original.names  # type: ignore[method-assign]


@dataclass(slots=True, eq=False)
class Start:
    """What a thread or a task takes over from whoever started it.

    Attributes
    ----------
    entries : tuple of Entry
        The scopes.
    device : int
        The device to set; -1 for none.
    origin : Origin or None
        Where it was started, if it is judged later: a task of workers whose device is not known until it runs, or what
        is only observed.
    observed : bool
        Whether it is left as torch starts it, and judged by what it did.
    """

    entries: tuple[scope.Entry, ...]
    device: int
    origin: callsite.Origin | None = None
    observed: bool = False


_DELETE = "_delete"
# id of a thread that runs, or is about to -> what it starts with
planned: dict[int, Start] = {}


def inherit(stack: scope.Stack) -> None:
    """Put the scopes that this thread was started with on its stack, which most threads never need."""
    ident = threading.get_ident()
    waiting = list(threading._limbo)  # type: ignore[attr-defined]
    # Python does not know a thread yet that has just begun; what it knows by the number may be one that is gone
    for thread in (threading._active.get(ident), *waiting):  # type: ignore[attr-defined]
        if thread is not None and thread._ident == ident and id(thread) in planned:
            begin = planned[id(thread)]
            stack.extend(begin.entries)
            if not begin.observed:
                at_end(thread, settle)
            return


def runs(thread: Any) -> bool:
    """Tell whether a thread has begun to run and has not ended."""
    return threading._active.get(getattr(thread, "_ident", None)) is thread  # type: ignore[attr-defined]


def forget_threads() -> None:
    """Forget all threads but this one: after a fork there are no others, and their identities come again."""
    mine = id(threading._active.get(threading.get_ident()))  # type: ignore[attr-defined]
    for other in planned.keys() - {mine}:
        del planned[other]


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


def safely(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; a failure of devguard itself is noted and costs no thread its life.

    Verdicts pass: an error of the mode ``error``, and a warning that the program's filters turn into one.
    """
    try:
        return function(*args)
    except (StrayDeviceError, StrayDeviceWarning):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        note(error)
        return None


def note(error: Exception) -> None:
    """Note a failure of devguard itself, for `status`."""
    if len(failures) < 16:
        failures.append(f"{type(error).__name__}: {error}")


def plan_thread(thread: threading.Thread, key: Any, code: Any) -> Start | None:
    """Decide with what a thread starts, and remember it under `key` where that says all that it depends on.

    Parameters
    ----------
    thread : threading.Thread
        The thread.
    key : tuple or None
        Its class, its target's code object by its identity, and the code object and instruction of whoever starts it;
        None where that cannot be told.
    code : code object or None
        Its target's, to keep that identity.

    Returns
    -------
    Start or None
        None to leave it alone.
    """
    work: Any = type(thread).run
    if work is threading.Thread.run:
        work = getattr(thread, "_target", None)
        if work is futures._worker or work is multiprocessing.pool.worker:  # type: ignore[attr-defined]
            return plan_worker()  # it outlives the scope that happens to start it
        sure = code is not None
    elif work is threading.Timer.run:
        work, sure = thread.function, False  # type: ignore[attr-defined]
    else:
        sure = True
    known = judged_here()
    begin = plan(work, 0)
    owner = scope.current_owner()
    adopts = not scope.local.stack and scope.process.adoption is not None  # each stray is told to it
    if not sure or key is None or adopts or begin is None or begin is not known.start or owner is None:
        return begin
    recorded = owner.index > 0 and callsite.runs_users(work)
    row = known.rows.get((NAME, "cuda:0", owner.tag, owner.tag, *key[2:])) if recorded else None
    if row is not None or not recorded:
        starts = scope.local.stack.starts
        if len(starts) >= MAX_ROWS:
            starts.clear()
        starts[key] = begin, known.top, known.era, row, code
    return begin


def plan(work: Any, default: int | None) -> Start | None:
    """Decide with what `work` starts.

    Parameters
    ----------
    work : callable
        What is to run.
    default : int or None
        The device on which it would start without devguard; None if nobody knows before it runs.

    Returns
    -------
    Start or None
        None to leave it alone.
    """
    owner = scope.owner_in_force()
    known = judged_here()
    start: Start | None = known.start
    if start is None:
        entries = tuple([(Inherited(within), its_owner, -1) for within, its_owner, _ in scope.local.stack])
        start = known.start = Start(entries, -1 if owner is None else owner.index)
    if owner is None:
        return start if start.entries else None
    mode = known.mode_of(NAME)
    if mode == "off":
        return Start(start.entries, -1) if scope.mode_of("") == "off" else None
    index = owner.index
    if index < 0:
        return start
    if mode not in ("repair", "error"):
        if index == default or not callsite.runs_users(work):
            return Start(start.entries, -1)
        return Start(start.entries, -1, callsite.origin(sys._getframe(1)), True)
    if default is None:
        return Start(start.entries, index, callsite.origin(sys._getframe(1)))
    if index == default or not callsite.runs_users(work) or _places(owner, default):
        return start
    return Start(start.entries, -1)


def _places(owner: Owner, default: int, origin: callsite.Origin | None = None) -> bool:
    """Record that what would start on the device `default` is placed on the owner's; tell whether it is to be."""
    return judge(NAME, f"cuda:{default}", owner, 0, _ADVICE, owner.tag, sys._getframe(1), origin=origin, places=True)


def plan_worker() -> Start | None:
    """Decide with what the worker of a pool starts: with the process's owner alone."""
    process = scope.process
    if process.owner is None or process.owner.index < 0:
        return None
    mode = process.mode_of(NAME)
    return Start((), process.owner.index) if mode in ("repair", "error") else None


def enter(begin: Start) -> tuple[int, int, Start | None]:
    """Enter the scopes of a task and set its device.

    Returns
    -------
    tuple of int, int and Start or None
        How deep the stack was, the device to give back, and what `judge_end` is to judge.
    """
    stack = scope.local.stack
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
    owner = scope.current_owner()
    if owner is None:
        return False
    current = sys.modules["torch"]._C._cuda_getDevice()
    return current == owner.index or _places(owner, current, origin)


def _strayed_to() -> int | None:
    """Return the device whose context this thread has current, if nobody in this process has owned it."""
    device = accelerator.bound_device()
    owner = scope.current_owner()  # an adopted one may not have been entered yet
    if device is None or (owner is not None and device == owner.index) or f"cuda:{device}" in owners.owned():
        return None
    return device


def end(begin: Start) -> None:
    """Judge and settle what a thread leaves behind that was left as torch starts it."""
    safely(judge_end, begin)
    settle()


def judge_end(begin: Start) -> None:
    """Judge what was left as torch starts it: a stray, if it has worked on a device that nobody owns, and is there."""
    owner, device = scope.current_owner(), _strayed_to()
    if owner is not None and owner.index >= 0 and device is not None:
        with contextlib.suppress(StrayDeviceError, StrayDeviceWarning):  # nobody is there to be told of it
            judge(NAME, f"cuda:{device}", owner, 0, _ADVICE, origin=begin.origin, places=True)


def leave(left: tuple[int, int, Start | None] | None) -> None:
    """Leave the scopes of a task, with what it forgot to leave itself, and give its worker's device back."""
    settle()
    if left is not None:
        depth, previous, begin = left
        if begin is not None:
            judge_end(begin)
        del scope.local.stack[depth:]
        if previous >= 0:
            scope.give_back(previous)


def settle() -> None:
    """Let the door ``set_device`` judge what a thread or a task leaves behind; nobody is there to be told of it."""
    stack = scope.local.stack
    if stack.changes:
        with contextlib.suppress(StrayDeviceWarning):
            safely(functools.partial(scope.settle, stack, leaving=True, failing=True))
