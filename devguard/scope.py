"""The stack of owners: one per thread, with the process's own owner under it.

A ``threading.local`` list, not a ContextVar: it is quicker (measured), and a ContextVar would leave an
owner behind in callbacks and in ``asyncio.to_thread``. The device of a thread belongs to the thread, so the
stack does too. Suspended coroutines and generators take their entries off the stack while they sleep: see
steps.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from devguard import accelerator, owners
from devguard.owners import Owner
from devguard.process import process
from devguard.settings import DEFAULT_MODE, DoorMode, Mode

if TYPE_CHECKING:
    from devguard.scopes import Scope

__all__ = [
    "Entry",
    "Stack",
    "asked",
    "current_owner",
    "disown",
    "end_task",
    "forget",
    "forget_past_owners",
    "local",
    "mode_of",
    "named",
    "on_prepare",
    "owner_in_force",
    "prepare",
    "process",
]

# scope, its owner (None: unguarded), the device to give back (-1: none was taken)
Entry = tuple["Scope", "Owner | None", int]


def _take_first(index: int) -> int:
    """Take a device on a thread that has taken none, or not since the doors were opened.

    ``set_device`` binds a context to the thread, which an exchange alone would not do. Then torch's own exchange takes
    over: it leaves everything alone for a negative index, so that the hot path needs no branch.
    """
    if index < 0:
        return -1
    moves = accelerator.bind()
    previous = moves.choose(index)
    stack = local.stack
    stack.take = moves.to
    if tracked and all(taken < 0 for _, _, taken in stack):
        stack.moved = False  # no scope that has a device to give back saw it moved
    return previous


class Stack(list[Entry]):
    """The entries of one thread, the innermost last.

    Attributes
    ----------
    take : callable
        ``take(index) -> previous index``. Makes a device current; for -1, the ``cpu`` owner's index, it does nothing.
        At first a function that prepares the thread, then torch's own.
    moved : bool
        Whether the current device may have been moved inside a scope that found it current; see doors/set_device.py.
    changes : list
        Changes of the current device that may still be put back; the door ``set_device`` keeps them.
    judged : Judged or None
        Strays that were judged under the innermost entry; verdict.py keeps them. Whoever puts entries on a stack that
        were on one before, or takes one out of the middle, forgets them.
    starts : dict
        The threads that were started under them; takeover.py keeps it. It counts only while `judged` is not None.
    """

    __slots__ = ("__weakref__", "changes", "judged", "moved", "starts", "take")

    def __init__(self) -> None:
        super().__init__()
        self.moved = True
        self.changes: list[Any] = []
        self.judged: Any = None
        self.starts: dict[Any, Any] = {}
        self.take: Callable[[int], int] = _take_first

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    __eq__ = object.__eq__


_stacks: weakref.WeakValueDictionary[int, Stack] = weakref.WeakValueDictionary()  # by identity


def stacks() -> list[Stack]:
    """Return the stacks of all threads that have one. It takes no lock: a finalizer may ask."""
    return [stack for reference in _stacks.valuerefs() if (stack := reference()) is not None]


tracked = False  # whether the door set_device marks the stacks


def _settle_nothing(stack: Stack, *, leaving: bool = False, failing: bool = False) -> None:
    """Stands for the door ``set_device`` while it is closed."""


# judges the changes of this thread whose authors have returned: at the next door, or as a scope is left
settle: Callable[..., None] = _settle_nothing


def _inherit_nothing(stack: Stack) -> None:
    """Stands for the door ``threads`` while it is closed."""


# puts the scopes that this thread was started with on its new stack
inherit: Callable[[Stack], None] = _inherit_nothing


class _Local(threading.local):
    """What devguard knows about one thread."""

    stack: Stack

    def __init__(self) -> None:
        self.stack = Stack()
        _stacks[id(self.stack)] = self.stack
        inherit(self.stack)


local = _Local()

# the stacks, by identity, that may have changes: for a door that cannot afford a look at the stack of its thread
changing: set[int] = set()

# devices on which unguarded code opened contexts, on purpose
unguarded_contexts: set[int] = set()


def _unbound(index: int) -> int:
    raise AssertionError("a device was given back before one was taken")


# torch's own function, put here by the first `prepare` of an accelerator owner
give_back: Callable[[int], int] = _unbound


def _says_nothing(door: str) -> DoorMode | None:
    """Leave the mode of every door to the scopes around."""
    return None


# called for each owner before its first entry, with what tells the mode that its scope sets for a door
on_prepare: list[Callable[[Owner, Callable[[str], DoorMode | None]], None]] = []


def prepare(owner: Owner, says: Callable[[str], DoorMode | None] = _says_nothing) -> None:
    """Make this process fit to enter `owner`: called for the first entry of each owner.

    Parameters
    ----------
    owner : Owner
        Who is about to be entered.
    says : callable
        ``says(door)`` returns the mode that the scope to be entered sets for a door, None if it says nothing.

    Raises
    ------
    DeviceResolutionError
        If this process does not see the device, or if this torch has no CUDA.
    """
    global give_back
    if owner.index >= 0:
        give_back = accelerator.bind().back
        if owner.index >= accelerator.device_count():
            raise accelerator.out_of_range("the guard", owner.index)
    for look in tuple(on_prepare):
        look(owner, says)
    owner.device = accelerator.torch_module().device(owner.tag)


def forget() -> None:
    """Make every owner and every thread be prepared again: the doors were closed."""
    for owner in list(owners.INTERNED.values()):
        owner.device = None
    for stack in stacks():
        stack.take = _take_first
        stack.moved = True
        stack.changes.clear()
    changing.clear()


def forget_past_owners() -> None:
    """Forget the owners that are in force nowhere any more: what they owned is not owned from here on."""
    in_force = {owner for stack in stacks() for _, owner, _ in tuple(stack)} | {process.owner}
    for owner in list(owners.INTERNED.values()):
        if owner not in in_force:
            owner.device = None


def disown() -> None:
    """Forget every owner and scope, in a child that was forked: of all threads only this one came along."""
    local.stack.clear()
    process.owner = None
    unguarded_contexts.clear()
    forget()
    if process.restart is not None:
        process.restart()


def look_for_changes() -> None:
    """Find out anew which stacks have changes: not only the door ``set_device`` takes them away, and threads end."""
    marked = changing.copy()  # before the look: what is marked meanwhile stays
    changing.difference_update(marked - {id(stack) for stack in stacks() if stack.changes})


def owner_in_force() -> Owner | None:
    """Return the owner that governs this thread now; None outside every scope and inside ``unguarded``.

    For doors: one that asks is the next door for whoever changed the device and did not put it back.
    """
    stack = local.stack
    if stack.changes:
        settle(stack)
    return stack[-1][1] if stack else process.owner


def current_owner() -> Owner | None:
    """Return the same as `owner_in_force`, for whoever just wants to know."""
    stack = local.stack
    return stack[-1][1] if stack else process.owner


def end_task() -> None:
    """Settle what a task, or a thread, leaves behind; for the doors that know its end."""
    stack = local.stack
    if stack.changes:
        settle(stack, leaving=True)


def mode_of(door: str, *, default: Mode = DEFAULT_MODE) -> DoorMode:
    """Return the mode in which `door` works on this thread now: the innermost scope that says anything wins.

    ``unguarded()`` says ``off``, and only for what runs directly in it: a guard inside names an owner again.
    """
    _, mode, guarded = _said_by(door)
    if mode is not None:
        return mode
    if guarded:  # by an owner that is no guess
        return process.doors.get(door) or process.mode or default
    return process.mode_of(door, default)


def named(door: str) -> bool:
    """Tell whether the mode of `door` on this thread was set for this door by its name."""
    scope = _said_by(door)[0]
    return door in process.doors if scope is None else scope.names(door)


def _said_by(door: str) -> tuple[Scope | None, DoorMode | None, bool]:
    """Return the innermost scope that says a mode for `door`, that mode, and whether a scope inside it has an owner."""
    guarded = False
    for scope, owner, _ in reversed(local.stack):
        if owner is not None:
            guarded = True
        elif guarded:
            continue
        mode = scope.mode_of(door)
        if mode is not None:
            return scope, mode, guarded
    return None, None, guarded


def asked(door: str) -> bool:
    """Tell whether a door that acts on request only was asked to: by ``remap()``, by a scope or by ``install``.

    For the empty name the answer is whether ``remap()`` is in force, which asks every door.
    """
    for scope, owner, _ in reversed(local.stack):
        if scope.asks_for(door):
            return True
        if owner is None:
            return False  # unguarded
    return door in process.doors
