"""The stack of owners: each thread has one, and each entered scope is an entry on it.

The stack is a ``threading.local`` list, not a ContextVar: a list is faster (measured), and a ContextVar would leave an
owner behind in callbacks and in ``asyncio.to_thread``. The current device belongs to the thread, so the stack does too.
Suspended coroutines and generators take their entries off the stack; see guards/coroutines.py.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from devguard.modes import DoorMode
from devguard.ownership import greenlets
from devguard.ownership.owner import Owner
from devguard.support import accelerator

__all__ = [
    "changing",
    "Entry",
    "inherit_with",
    "judge_pending",
    "local",
    "look_for_changes",
    "mark_changes",
    "on_taken",
    "prepare_again",
    "ScopePolicy",
    "site_of_work",
    "Stack",
    "stacks",
    "take_first",
    "unwatch_moves",
    "watch_moves",
]


class ScopePolicy(Protocol):
    """The part of an entered scope that sets modes of doors."""

    def mode_of(self, door: str) -> DoorMode | None:
        """Return the mode that this scope sets for `door`, None to keep the mode of the scope around it."""

    def requests(self, door: str) -> bool:
        """Return whether this scope requests a door that acts on request only."""

    def names(self, door: str) -> bool:
        """Return whether this scope sets the mode of `door` by its name."""


# scope, its owner (None: unguarded), the device to give back (-1: none was taken)
Entry = tuple[ScopePolicy, "Owner | None", int]


# Called after a thread has taken its first device, which may have opened a context. They raise no Exception.
on_taken: list[Callable[[], None]] = []


def take_first(index: int) -> int:
    """Take a device on a thread that has taken none, or not since the doors were opened.

    ``set_device`` binds a context to the thread, which an exchange alone would not do. Afterwards torch's own exchange
    takes over: it ignores a negative index, so that the hot path needs no branch.
    """
    if index < 0:
        _watch_greenlets(local.stack)
        return -1
    exchange = accelerator.bind()
    previous = exchange.choose(index)
    try:
        for note in tuple(on_taken):
            note()
    except BaseException:  # an interrupt, before any entry would give the device back
        exchange.back(previous)
        raise
    _bind(local.stack, exchange)
    return previous


def _give_back_first(index: int) -> int:
    """Give a device back on a thread that has taken none: a coroutine that took it elsewhere goes on here."""
    if index < 0:
        return -1
    exchange = accelerator.bind()
    _bind(local.stack, exchange)
    return exchange.back(index)


def _bind(stack: Stack, exchange: accelerator.Exchange) -> None:
    """Let torch's own functions exchange the device of this thread from now on."""
    stack.take, stack.give_back, stack.read = exchange.to, exchange.back, exchange.read
    _watch_greenlets(stack, exchange)


def _watch_greenlets(stack: Stack, exchange: accelerator.Exchange | None = None) -> None:
    if greenlets.is_imported():
        greenlets.watch(None if _PER_GREENLET else stack, exchange)


def _read_if_initialized() -> int:
    return accelerator.current_device() if accelerator.is_initialized() else -1


class Stack(list[Entry]):
    """The entries of one thread, the innermost last.

    Attributes
    ----------
    take : callable
        ``take(index) -> previous index``. Makes a device current; for -1, the ``cpu`` owner's index, it does nothing.
        At first a function that prepares the thread, then torch's own.
    give_back : callable
        ``give_back(index) -> previous index``. Restores the device that was current before an entry took its own, and
        returns the one that its code left current; for -1 it does nothing. Set to torch's own by the first `take`.
    read : callable
        ``read() -> index``. The current device; -1 before CUDA is initialised, which a query would do. Set by the first
        `take` to torch's own.
    changes : list
        Changes of the current device that may still be put back; the door ``set_device`` keeps them.
    judged : Judged or None
        Strays that were judged under the innermost entry; reporting/verdict.py keeps them. Code that puts entries back
        on a stack, or takes one out of the middle, sets it to None.
    starts : dict
        The threads that were started under the same entry; doors/concurrency/thread_plan.py keeps them. Valid only
        while `judged` is not None.
    inherited : Start or None
        What the thread took over when it was started; doors/concurrency/thread_run.py keeps it.
    task : Start or None
        What the task of a pool that the thread runs now took over; doors/concurrency/thread_run.py keeps it.
    hidden : tuple of Entry
        The thread's own entries, while it runs a task.
    selected : bool
        Set to True whenever code selects a device, the current one included; the door ``set_device`` sets it.
    """

    __slots__ = (
        "__weakref__",
        "changes",
        "give_back",
        "hidden",
        "inherited",
        "judged",
        "read",
        "selected",
        "starts",
        "take",
        "task",
    )

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[Any] = []
        self.judged: Any = None
        self.starts: dict[Any, Any] = {}
        self.inherited: Any = None
        self.task: Any = None
        self.hidden: tuple[Entry, ...] = ()
        self.selected = False
        self.take: Callable[[int], int] = take_first
        self.give_back: Callable[[int], int] = _give_back_first
        self.read: Callable[[], int] = _read_if_initialized

    def restore(self, device: int) -> int:
        """Restore the device that was current before code which took none; return the one that the code left current.

        A `device` of -1 was read before CUDA was initialised, when device 0 was current.
        """
        inside = self.read()
        if inside >= 0 and inside != max(device, 0):
            self.give_back(max(device, 0))
        return inside

    def forget_device(self) -> None:
        """Prepare this thread again the next time that it takes a device: the doors were closed."""
        self.take, self.read = take_first, _read_if_initialized
        self.changes.clear()


def site_of_work(stack: Stack) -> Any:
    """Return the call site that started what this thread runs, if that work itself has no line of user code."""
    start = stack.task or stack.inherited
    return None if start is None else start.site


_stacks: weakref.WeakValueDictionary[int, Stack] = weakref.WeakValueDictionary()  # by identity


def stacks() -> list[Stack]:
    """Return the stacks of all threads that have one. Takes no lock, so finalizers can call it."""
    return [stack for reference in _stacks.valuerefs() if (stack := reference()) is not None]


def prepare_again() -> None:
    """Prepare each thread again the next time that it takes a device; watch the greenlets of this one now."""
    for stack in stacks():
        stack.take = take_first
    _watch_greenlets(local.stack)


def _give_back_nothing(index: int) -> int:
    return -1


def _forget_devices() -> None:
    """Forget torch's functions in a forked child: the parent has initialised CUDA, so that each of them raises."""
    for stack in stacks():
        if stack.give_back is not _give_back_first:
            stack.forget_device()
            stack.give_back = _give_back_nothing
    greenlets.forget_devices()


os.register_at_fork(after_in_child=_forget_devices)


class JudgePending(Protocol):
    """The door ``set_device``: judges changes of the current device when their authors have returned."""

    def __call__(
        self, stack: Stack, *, leaving: bool = False, failing: bool = False, current: int | None = None
    ) -> None: ...


class _Hooks:
    """What the doors ``set_device`` and ``threads`` add to the stacks while they are open."""

    __slots__ = ("inherit", "judge_pending")

    def __init__(self) -> None:
        self.judge_pending: JudgePending | None = None
        self.inherit: Callable[[Stack], None] | None = None


_hooks = _Hooks()


def watch_moves(judge: JudgePending) -> None:
    """Let `judge` judge pending changes of the current device: at the next door, and when a scope is left."""
    _hooks.judge_pending = judge


def unwatch_moves() -> None:
    """Undo `watch_moves`."""
    _hooks.judge_pending = None


def judge_pending(stack: Stack, *, leaving: bool = False, failing: bool = False, current: int | None = None) -> None:
    """Judge the pending changes of the current device, if they are watched.

    Parameters
    ----------
    stack : Stack
        The stack of this thread.
    leaving : bool
        Whether the innermost scope, or the thread's task, ends here.
    failing : bool
        Whether an exception is on its way out of that scope; then no other is raised.
    current : int, optional
        The device that the code of that scope left current, if it has been given back since.
    """
    judge = _hooks.judge_pending  # read once: another thread may close the door
    if judge is not None:
        judge(stack, leaving=leaving, failing=failing, current=current)


def inherit_with(inherit: Callable[[Stack], None] | None) -> None:
    """Call ``inherit(stack)`` for the new stack of each thread; None stops the calls."""
    _hooks.inherit = inherit


# gevent and eventlet replace the class of the C module `_thread`.
_PER_GREENLET = threading.local.__module__ != "_thread"


class _Local(threading.local):
    """The state of devguard in one thread."""

    stack: Stack

    def __init__(self) -> None:
        self.stack = Stack()
        _stacks[id(self.stack)] = self.stack
        if _PER_GREENLET:
            greenlets.register(self.stack)
        inherit = _hooks.inherit  # read once: another thread may close the door
        if inherit is not None:
            inherit(self.stack)


local = _Local()

# The stacks, by identity, that may have pending changes; for the door ``ipc``, which cannot afford to read its thread's
# stack.
changing: set[int] = set()


def mark_changes(stack: Stack) -> None:
    """Update `changing` after a change was added to a stack or removed from it."""
    if stack.changes:
        changing.add(id(stack))
    else:
        changing.discard(id(stack))


def look_for_changes() -> None:
    """Update `changing` for all stacks: code outside the door ``set_device`` removes changes too, and threads end."""
    marked = changing.copy()  # before the look: a stack that is marked meanwhile stays
    changing.difference_update(marked - {id(stack) for stack in stacks() if stack.changes})
