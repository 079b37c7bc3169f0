"""What a thread, or a task of a pool, takes over from whoever started it; for the door ``threads``.

It is planned on the thread that starts it, where a stray is judged, and entered on the thread that runs it. A thread's
device is set at once; its scopes wait until something first asks for them (`inherit`), which in most threads nothing
does.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from devguard import callsite, scope
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.scopes import Scope
from devguard.verdict import judge

__all__ = [
    "Inherited",
    "Start",
    "begun",
    "enter",
    "failures",
    "inherit",
    "leave",
    "plan",
    "plan_worker",
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

    __slots__ = ("asks_for", "mode_of")

    def __init__(self, original: Scope) -> None:
        self.mode_of = original.mode_of  # type: ignore[method-assign]
        self.asks_for = original.asks_for  # type: ignore[method-assign]


class Start(NamedTuple):
    """What a thread or a task takes over from whoever started it.

    Attributes
    ----------
    entries : tuple of Entry
        The scopes.
    device : int
        The device to set; -1 for none.
    origin : Origin or None
        Where a task was submitted to workers whose device is not known until it runs: it is judged then.
    """

    entries: tuple[scope.Entry, ...]
    device: int
    origin: callsite.Origin | None = None


# thread number -> what it was started with; None once that is on its stack, which most threads never need
begun: dict[int, Start | None] = {}


def inherit(stack: scope.Stack) -> None:
    """Put the scopes that this thread was started with on its stack."""
    ident = threading.get_ident()
    begin = begun.get(ident)
    if begin is not None:
        stack.extend(begin.entries)
        begun[ident] = None


def safely(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; a failure of devguard itself is noted and costs no thread its life.

    Verdicts pass: an error of the mode ``error``, and a warning that the program's filters turn into one.
    """
    try:
        return function(*args)
    except (StrayDeviceError, StrayDeviceWarning):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        if len(failures) < 16:
            failures.append(f"{type(error).__name__}: {error}")
        return None


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
    entries = tuple([(Inherited(within), its_owner, -1) for within, its_owner, _ in scope.local.stack])
    if owner is None:
        return Start(entries, -1) if entries else None
    mode = scope.mode_of(NAME)
    if mode == "off":
        return Start(entries, -1) if scope.mode_of("") == "off" else None
    index = owner.index
    if index < 0:
        return Start(entries, -1)
    if default is None:
        origin = callsite.origin(sys._getframe(1))
        return Start(entries, index, origin)
    if index != default and _is_users(work):
        moves = judge(NAME, f"cuda:{default}", owner, 0, _ADVICE, target=owner.tag)
    else:
        moves = mode in ("repair", "error")
    return Start(entries, index if moves else -1)


def plan_worker() -> Start | None:
    """Decide with what the worker of a pool starts: with the process's owner alone."""
    process = scope.process
    if process.owner is None or process.owner.index < 0:
        return None
    mode = process.mode_of(NAME)
    return Start((), process.owner.index) if mode in ("repair", "error") else None


def _is_users(work: Any) -> bool:
    """Tell whether a callable is the user's own: not of torch, of the standard library, or decorated by devguard."""
    while isinstance(work, functools.partial):
        in_context = isinstance(getattr(work.func, "__self__", None), contextvars.Context)  # asyncio.to_thread
        work = work.args[0] if in_context and work.args else work.func
    work = getattr(work, "__func__", work)
    call = work if hasattr(work, "__code__") else vars(type(work)).get("__call__")
    code = getattr(call, "__code__", None)
    return work is not None and (code is None or callsite.is_user(code))


def enter(begin: Start) -> tuple[int, int]:
    """Enter the scopes and set the device; return how deep the stack was, and the device to give back."""
    stack = scope.local.stack
    depth = len(stack)
    stack.extend(begin.entries)
    try:
        moves = begin.origin is None or _may_move(begin.origin)
        return depth, stack.take(begin.device if moves else -1)
    except Exception:
        del stack[depth:]  # the scopes without their device would promise what is not so
        raise


def _may_move(origin: callsite.Origin) -> bool:
    """Judge a task whose worker chose its device by itself; tell whether it may be moved."""
    owner = scope.current_owner()
    if owner is None:
        return False
    current = sys.modules["torch"]._C._cuda_getDevice()
    if current == owner.index:
        return True
    return judge(NAME, f"cuda:{current}", owner, 0, _ADVICE, target=owner.tag, origin=origin)


def leave(left: tuple[int, int] | None) -> None:
    """Leave the scopes of a task, with what it forgot to leave itself, and give its worker's device back."""
    settle()
    if left is not None:
        depth, previous = left
        del scope.local.stack[depth:]
        if previous >= 0:
            scope.give_back(previous)


def settle() -> None:
    """Let the door ``set_device`` judge what a thread or a task leaves behind; nobody is there to be told of it."""
    stack = scope.local.stack
    if stack.changes:
        with contextlib.suppress(StrayDeviceWarning):
            safely(functools.partial(scope.settle, stack, leaving=True, failing=True))
