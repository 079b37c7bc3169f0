"""Entries and exits of scopes that need more than a push and a pop.

A scope object is configuration, and one object may be entered several times at once: by nested blocks, by coroutines
that take turns, by threads. So an entry has an identity of its own. It is the object itself where that is entered once
on a thread, and an `Again` where it is entered again. An exit belongs to the entry that the same frame made; only
frames of generators and coroutines can be suspended, so all others are left in the order of the stack.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType

from devguard.modes import DoorMode
from devguard.ownership.owner import Owner
from devguard.ownership.stack import Entry, ScopePolicy, Stack, judge_pending, local
from devguard.support import callsite
from devguard.support.notices import warn_user

__all__ = [
    "Again",
    "caller_of",
    "enter_again",
    "holder_of",
    "is_entered",
    "judge_changes",
    "leave",
    "report_missing",
]

_CAN_BE_SUSPENDED = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR
)


class Again:
    """One more entry of a scope that is entered already on this thread.

    Attributes
    ----------
    scope : ScopePolicy
        The scope.
    holder : int
        The identity of the generator or coroutine frame that made the entry; 0 for any other frame.
    """

    __slots__ = ("holder", "scope")

    def __init__(self, scope: ScopePolicy, holder: int) -> None:
        self.scope = scope
        self.holder = holder

    def mode_of(self, door: str) -> DoorMode | None:
        """Return the mode that the scope sets for `door`."""
        return self.scope.mode_of(door)

    def requests(self, door: str) -> bool:
        """Return whether the scope requests a door that acts on request only."""
        return self.scope.requests(door)

    def names(self, door: str) -> bool:
        """Return whether the scope sets the mode of `door` by its name."""
        return self.scope.names(door)


def is_entered(stack: Stack, scope: ScopePolicy) -> bool:
    """Return whether the stack has an entry of `scope`."""
    for within, _, _ in stack:  # noqa: SIM110 - `any` takes twice as long, on the hot path of nested guards
        if within is scope or (within.__class__ is Again and within.scope is scope):
            return True
    return False


def enter_again(scope: ScopePolicy, owner: Owner | None, frame: FrameType) -> None:
    """Push an entry with an identity of its own; `frame` enters the scope."""
    stack = local.stack
    holder = holder_of(frame)
    stack.append((Again(scope, holder), owner, stack.take(-1 if owner is None else owner.index)))


def leave(scope: ScopePolicy, frame: FrameType, failing: bool) -> None:
    """Take an entry of `scope` off the stack, in or out of order; `frame` leaves the scope.

    Out of order, the current device belongs to the entries above, so it stays, and the device that was current before
    goes to the entry above, which gives it back when it is left.
    """
    stack = local.stack
    position = _position(stack, scope, frame)
    if position < 0:
        report_missing()
        return
    entry = stack[position]
    above = position + 1
    if above == len(stack):
        del stack[position]
        inside = stack.give_back(entry[2])
        if stack.changes:
            judge_changes(stack, entry, inside, failing)
        return
    del stack[position]
    while position < len(stack) and stack[position][2] < 0:  # an entry that took no device has none to give back
        position += 1
    if position < len(stack):
        if entry[2] >= 0:
            stack[position] = (*stack[position][:2], entry[2])
    else:
        stack.give_back(entry[2])
    stack.judged = None
    stack.changes.clear()  # it is no longer known which scope a change belongs to
    _report(
        "was held across an await or a yield, and other code ran under its device meanwhile. Decorate the function, or "
        "use guard(...).run(awaitable): they hold the device only while your code runs"
    )


def judge_changes(stack: Stack, entry: Entry, inside: int, failing: bool) -> None:
    """Judge the pending changes of the current device that were made under `entry`, which has just been taken off.

    Parameters
    ----------
    stack : Stack
        The stack of this thread.
    entry : Entry
        The entry.
    inside : int
        The device that its code left current, if it has been given back since; else -1.
    failing : bool
        Whether an exception is on its way out of the scope.
    """
    depth = len(stack)
    try:
        stack.append(entry)
        judge_pending(stack, leaving=True, failing=failing, current=None if inside < 0 else inside)
    finally:
        del stack[depth:]


def _position(stack: Stack, scope: ScopePolicy, frame: FrameType) -> int:
    """Return the position of the entry of `scope` that `frame` made; -1 if the stack has none of the scope.

    The first entry names no holder. It belongs to a frame that can be suspended if no other entry names that frame.
    """
    holder = holder_of(frame)
    first = plain = newest = -1
    for position in range(len(stack) - 1, -1, -1):
        within = stack[position][0]
        if within is scope:
            first = position
        elif within.__class__ is not Again or within.scope is not scope:
            continue
        elif holder and within.holder == holder:
            return position
        elif plain < 0 and not within.holder:
            plain = position
        newest = max(newest, position)
    candidates = (first, plain) if holder else (plain, first)
    return next((position for position in candidates if position >= 0), newest)


def caller_of(frame: FrameType) -> FrameType | None:
    """Return the frame that enters or leaves a scope: `frame`, or the caller of its ExitStack."""
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename == contextlib.__file__:
        caller = caller.f_back
    return caller


def holder_of(frame: FrameType) -> int:
    """Return the identity of a frame that can be suspended, 0 for any other; an ExitStack is a part of its caller."""
    caller = caller_of(frame)
    return id(caller) if caller is not None and caller.f_code.co_flags & _CAN_BE_SUSPENDED else 0


_reported = callsite.SeenLines()


def report_missing() -> None:
    """Warn of a scope that is left, but is not on the stack of this thread."""
    _report("was left on a thread that had not entered it; that thread still holds its device")


def _report(what: str) -> None:
    """Warn of a misused scope, once per call site."""
    code, line, _ = callsite.find(sys._getframe(2))
    if code is None:
        warn_user(f"a devguard scope {what}.", level=3)
    elif _reported.add(code, line):
        warn_user(f"a devguard scope {what}.", at=(code.co_filename, line))
