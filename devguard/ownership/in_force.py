"""The rules in force on this thread: its owner and the mode of each door, from its scopes and then from the process."""

from __future__ import annotations

from devguard.modes import DEFAULT_MODE, DoorMode, Mode
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import ScopePolicy, judge_pending, local

__all__ = ["close_doors", "end_task", "is_named", "is_requested", "mode_of", "owner", "owner_at_door"]


class _Doors:
    """Whether the doors were closed: a patch that outlives that, because other code has kept it, finds no owner."""

    __slots__ = ("closed",)

    def __init__(self) -> None:
        self.closed = False


_doors = _Doors()


def close_doors(closed: bool) -> None:
    """Let doors find no owner from now on, or find it again."""
    _doors.closed = closed


def owner_at_door(*, uses_gpu: bool = True) -> Owner | None:
    """Return the owner of this thread; None outside every scope and inside ``unguarded``.

    Also judges device changes that were not undone, and, where the caller `uses_gpu`, lets a child that has chosen no
    GPU inherit its rank's. For doors; other callers use `owner`.
    """
    if _doors.closed:
        return None
    stack = local.stack
    if stack.changes:
        judge_pending(stack)
    if stack:
        return stack[-1][1]
    if process.owner is None and uses_gpu and process.adoption is not None:
        return process.adoption.owner_at_first_use()
    return process.owner


def owner() -> Owner | None:
    """Return the owner of this thread; None outside every scope and inside ``unguarded``."""
    stack = local.stack
    return stack[-1][1] if stack else process.owner


def end_task() -> None:
    """Judge the device changes that a task, or a thread, did not undo; for the doors that see its end."""
    stack = local.stack
    if stack.changes:
        judge_pending(stack, leaving=True)


def mode_of(door: str, *, default: Mode = DEFAULT_MODE) -> DoorMode:
    """Return the mode of `door` on this thread: that of the innermost scope that sets one.

    ``unguarded()`` sets ``off``, but only for code directly inside it: a guard inside it has an owner again.
    """
    _, mode, guarded = _source(door)
    if mode is not None:
        return mode
    if guarded:  # the owner of a scope is not a guess, so adoption limits nothing
        return process.doors.get(door) or process.mode or default
    return process.mode_of(door, default)


def is_named(door: str) -> bool:
    """Return whether the mode of `door` on this thread was set for this door by its name."""
    scope = _source(door)[0]
    return door in process.doors if scope is None else scope.names(door)


def _source(door: str) -> tuple[ScopePolicy | None, DoorMode | None, bool]:
    """Return the innermost scope that sets a mode for `door`, that mode, and whether a scope inside it has an owner."""
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


def is_requested(door: str) -> bool:
    """Return whether a door that acts on request only was requested: by ``remap()``, by a scope or by ``install``.

    For the empty name: whether ``remap()`` is in force, which requests every door.
    """
    for scope, owner, _ in reversed(local.stack):
        if scope.requests(door):
            return True
        if owner is None:
            return False  # unguarded
    return door in process.doors
