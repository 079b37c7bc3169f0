"""Exits of scopes that need more than a pop: the device was moved inside, or scopes are left out of order.

A scope is left out of order if it was held across an await or a yield, or is left on a thread that never entered it.
"""

from __future__ import annotations

import sys
from types import CodeType

from devguard.ownership.stack import Entry, judge_pending, local, moves_are_watched
from devguard.support import callsite
from devguard.support.notices import warn_user

__all__ = ["remove", "restore_device"]


def restore_device(entry: Entry, failing: bool) -> None:
    """Give back the device of `entry`, which has just been popped, after the device was moved inside its scope.

    Parameters
    ----------
    entry : Entry
        With the device that was current when the scope was entered; -1 if it took none.
    failing : bool
        Whether an exception is on its way out of the scope.
    """
    stack = local.stack
    try:
        if stack.changes:
            stack.append(entry)
            try:
                judge_pending(stack, leaving=True, failing=failing)
            finally:
                stack.pop()
    finally:
        if entry[2] >= 0:
            stack.give_back(entry[2])
        if not stack and moves_are_watched():
            stack.moved = False


def remove(scope: object) -> None:
    """Remove the newest entry of `scope` from the middle of the stack, and report it.

    The current device belongs to the entries above, so it stays. The saved device goes to the entry above, which gives
    it back when it is left.
    """
    stack = local.stack
    for position in range(len(stack) - 1, -1, -1):
        if stack[position][0] is scope:
            break
    else:
        _report("was left on a thread that had not entered it; that thread still holds its device")
        return
    above = position + 1
    if stack[position][2] >= 0:
        while above < len(stack) and stack[above][2] < 0:  # an entry that took no device has none to give back
            above += 1
        if above < len(stack):
            stack[above] = (*stack[above][:2], stack[position][2])
        else:
            stack.give_back(stack[position][2])
    del stack[position]
    stack.judged = None
    stack.changes.clear()  # it is no longer known which scope a change belongs to
    stack.moved = True  # the entries above must compare the device when they are left
    _report(
        "was held across an await or a yield, and other code ran under its device meanwhile. Decorate the function, or "
        "use guard(...).run(awaitable): they hold the device only while your code runs"
    )


_reported: dict[tuple[int, int], CodeType] = {}  # by identity: equal code may lie in two files


def _report(what: str) -> None:
    """Warn of a misused scope, once per call site."""
    code, line, _ = callsite.find(sys._getframe(2))
    if code is None:
        warn_user(f"a devguard scope {what}.", level=3)
    elif (id(code), line) not in _reported:
        _reported[id(code), line] = code
        warn_user(f"a devguard scope {what}.", at=(code.co_filename, line))
