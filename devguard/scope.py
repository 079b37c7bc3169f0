"""The stack of owners: one per thread, with the process's own owner under it.

A ``threading.local`` list, not a ContextVar: it is quicker (measured), and a ContextVar would leave an
owner behind in callbacks and in ``asyncio.to_thread``. The device of a thread belongs to the thread, so the
stack does too. Suspended coroutines and generators take their entries off the stack while they sleep: see
steps.py.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from devguard import accelerator, callsite, owners
from devguard.owners import Owner
from devguard.settings import DEFAULT_MODE, Mode

if TYPE_CHECKING:
    from devguard.guards import Scope

__all__ = ["Entry", "local", "mode_of", "owner_in_force", "prepare", "process", "remove"]

# scope, its owner (None: unguarded), the device to give back (-1: none was taken)
Entry = tuple["Scope", "Owner | None", int]


class _Ready(set[Owner]):
    """The owners that a thread has entered before; weakly referenced, so that `forget` finds every thread's."""

    __slots__ = ()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


_all_ready: weakref.WeakSet[_Ready] = weakref.WeakSet()


class _Local(threading.local):
    """What devguard knows about one thread."""

    stack: list[Entry]
    ready: _Ready

    def __init__(self) -> None:
        self.stack = []
        self.ready = _Ready()
        _all_ready.add(self.ready)


local = _Local()


class _Process:
    """What holds where no scope does: the owner and the modes given to ``install``."""

    __slots__ = ("doors", "mode", "owner")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.owner: Owner | None = None
        self.mode: Mode | None = None
        self.doors: dict[str, Mode] = {}


process = _Process()


def _unbound(index: int) -> int:
    raise AssertionError("a device was exchanged before `prepare` found the exchange functions")


# torch's own functions, put here by the first `prepare` of an accelerator owner
exchange: Callable[[int], int] = _unbound
give_back: Callable[[int], int] = _unbound


def prepare(owner: Owner) -> None:
    """Make this thread fit to enter `owner`: called for the first entry of each owner on each thread.

    Checks that the device exists, and on a thread's first accelerator owner lets ``set_device`` bind a
    context to the thread (an exchange alone would leave a fresh thread without one). The device that was
    current is current again afterwards: the entry itself takes the owner's.

    Raises
    ------
    DeviceResolutionError
        If this process does not see the device.
    """
    global exchange, give_back
    if owner.index >= 0:
        moves = accelerator.bind()
        if owner.index >= accelerator.device_count():
            raise accelerator.out_of_range("the guard", owner.index)
        exchange, give_back = moves.to, moves.back
        if not any(known.index >= 0 for known in local.ready):
            previous = moves.choose(owner.index)
            moves.back(previous)
    owners.owned.add(owner)
    local.ready.add(owner)


def forget() -> None:
    """Make every thread prepare its owners again; the doors were closed."""
    for ready in list(_all_ready):
        ready.clear()


def owner_in_force() -> Owner | None:
    """Return the owner that governs this thread now; None outside every scope and inside ``unguarded``."""
    stack = local.stack
    return stack[-1][1] if stack else process.owner


def mode_of(door: str, *, default: Mode = DEFAULT_MODE) -> Mode:
    """Return the mode in which `door` works on this thread now: the innermost scope that says anything wins."""
    for scope, _, _ in reversed(local.stack):
        mode = scope.mode_of(door)
        if mode is not None:
            return mode
    return process.doors.get(door) or process.mode or default


def asked(door: str) -> bool:
    """Tell whether a door that acts on request only was asked to: by ``remap()``, by a scope or by ``install``."""
    for scope, owner, _ in reversed(local.stack):
        if scope.asks_for(door):
            return True
        if owner is None:
            return False  # unguarded
    return door in process.doors


def remove(scope: Scope) -> None:
    """Take the newest entry of `scope` out of the middle of the stack, and report it.

    The current device belongs to the entries above: it stays, and the saved device goes to the entry above,
    which will give it back in its turn.
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
            give_back(stack[position][2])
    del stack[position]
    _report(
        "was held across an await or a yield, and other code ran under its device meanwhile. Decorate the function, or "
        "use guard(...).run(awaitable): they hold the device only while your code runs"
    )


_reported: set[tuple[CodeType, int]] = set()


def _report(what: str) -> None:
    """Warn once per call site that a scope was misused."""
    frame: FrameType = sys._getframe(2)
    site = callsite.find(frame).site
    if site is None:
        warnings.warn(f"a devguard scope {what}.", RuntimeWarning, stacklevel=3)
    elif site not in _reported:
        _reported.add(site)
        warnings.warn_explicit(f"a devguard scope {what}.", RuntimeWarning, site.code.co_filename, site.line)
