"""The door ``set_device``: a library changes the current device and returns without restoring it.

The door watches the calls that change the device permanently (`MOVERS`). A change is a stray if the code that made it
has returned and the device is still there: at the next door, when a guard is left, or when a thread or pool task ends.
Mode ``error`` raises at a door or at a guard's exit, so after the change; at the end of a thread or task it records
``refused`` and raises nothing. Code that no other package called chooses its own device. See docs/doors.md.

Not watched: context managers that restore the device themselves, such as ``torch.cuda.device``, and C++ code that calls
``cudaSetDevice``. A guard restores its device after them, too, but nothing records them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

from devguard.errors import StrayDeviceError
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import Stack, local, mark_changes, unwatch_moves, watch_moves
from devguard.reporting.advice import advise
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite
from devguard.support.callsite import Origin
from devguard.support.patching import Patches

__all__ = ["install", "MOVERS", "status", "uninstall"]

NAME = "set_device"

# The C functions behind torch.cuda.set_device and set_stream, and torch.accelerator.set_device_index and set_stream.
# Not every torch has all of them.
MOVERS = ("_cuda_setDevice", "_cuda_setStream", "_accelerator_setDeviceIndex", "_accelerator_setStream")

_patches = Patches()
_ADVICE = advise(NAME)


class Change(NamedTuple):
    """One change of the current device that may still be undone.

    The code is kept by its code object and the identity of its frame: holding the frame would keep its tensors alive.

    Attributes
    ----------
    depth : int
        The number of scopes that the thread had entered.
    before, after : int
        The devices.
    package : str
        The package of the code that made the change.
    code, frame : code object, int
        The code object and the identity of the outermost frame of that package.
    origin : Origin
        The call site.
    """

    depth: int
    before: int
    after: int
    package: str
    code: CodeType
    frame: int
    origin: Origin


def install() -> None:
    """Watch `MOVERS`; in a build without CUDA there is nothing to watch."""
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    _patches.find(torch._C, "_cuda_setDevice")
    get_device, _ = accelerator.queries()
    for name in MOVERS:
        if hasattr(torch._C, name):
            _patches.replace(torch._C, name, _wrap(_patches.find(torch._C, name), get_device))
    watch_moves(_judge_pending)


def uninstall() -> list[str]:
    """Restore torch's own functions."""
    unwatch_moves()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the watched functions, and the number of changes on this thread that may still be undone."""
    watched = [f"{owner.__name__}.{name}" for owner, name, _, _ in _patches.replaced]
    return {"watched": watched, "pending": len(local.stack.changes)}


def _wrap(original: Callable[..., Any], get_device: Callable[[], int]) -> Callable[..., Any]:
    """Return `original`, with a comparison of the current device before and after the call."""

    def move(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        stack.selected = True
        owner = stack[-1][1] if stack else process.owner
        adoption = None if stack else process.adoption
        follows = False
        if adoption is not None and adoption.watches():
            follows = not _is_ours(sys._getframe(1)) and not _is_with_block(sys._getframe(1))
        if (owner is None or owner.index < 0) and not stack.changes and not follows:
            return original(*args, **kwargs)
        before = get_device()
        result = original(*args, **kwargs)
        after = get_device()
        if adoption is not None and follows:
            was_frozen = adoption.frozen
            adoption.follow(after, sys._getframe(1))
            if not was_frozen:
                return result  # The process is still choosing its device, so no device is the wrong one.
        if after != before:
            _keep_change(stack, owner, before, after, sys._getframe(1))
            mark_changes(stack)
        return result

    return move


def _keep_change(stack: Stack, owner: Owner | None, before: int, after: int, start: FrameType) -> None:
    """Keep a change, or drop the kept change that it undoes."""
    changes: list[Change] = stack.changes
    depth = len(stack)
    home = owner is not None and owner.index == after
    # Fast path: the first change is undone, and so are all later ones.
    if home and changes and changes[0].depth == depth and changes[0].before == after:
        changes.clear()
        return
    if _is_ours(start):
        return  # A scope takes or restores its device.
    found = _find_author(start)
    package, outermost = found or ("", start)
    for position, change in enumerate(changes):
        if change.depth == depth and change.before == after and (home or change.package == package):
            del changes[position:]
            return
    if (
        found is None
        or owner is None
        or owner.index < 0
        or in_force.mode_of(NAME) == "off"
        or is_allowed(f"cuda:{after}")
    ):
        _drop_changes(changes, depth)
        return
    for position, change in enumerate(changes):
        if change.depth == depth and change.package == package:
            before = change.before
            del changes[position:]
            break
    origin = callsite.origin_of(start)
    changes.append(Change(depth, before, after, package, outermost.f_code, id(outermost), origin))


def _is_ours(start: FrameType) -> bool:
    """Return whether the caller is devguard, directly or through one function of torch."""
    ours = __name__.partition(".")[0] + "."
    return any(
        frame.f_globals.get("__name__", "").startswith(ours) and not callsite.is_user(frame.f_code)
        for frame in (start, start.f_back)
        if frame is not None
    )


def _is_with_block(start: FrameType) -> bool:
    """Return whether the caller is ``with torch.cuda.stream(...)``, which restores the device and so chooses none."""
    frame: FrameType | None = start
    while frame is not None and frame.f_globals.get("__name__") == "torch.cuda":
        if frame.f_code.co_name in ("__enter__", "__exit__"):
            return True
        frame = frame.f_back
    return False


def _find_author(start: FrameType) -> tuple[str, FrameType] | None:
    """Return the package of the innermost user frame from `start` outwards, and the outermost frame of that package.

    None if no other package called that frame: then the code chooses its own device.
    """
    package: str | None = None
    outermost, called = start, False
    frame: FrameType | None = start
    while frame is not None:
        if callsite.is_user(frame.f_code):
            name = _package_of(frame)
            if package is None or name == package:
                package, outermost, called = name, frame, False
            else:
                called = True
        frame = frame.f_back
    return (package, outermost) if package is not None and called else None


def _package_of(frame: FrameType) -> str:
    """Return the top-level name of the module of a frame; for ``python -m``, the top-level name of its package."""
    name = frame.f_globals.get("__package__") or frame.f_globals.get("__name__") or ""
    return str(name).partition(".")[0]


def _judge_pending(stack: Stack, *, leaving: bool = False, failing: bool = False, current: int | None = None) -> None:
    """Judge the newest change of the innermost scope, if the code that made the change has returned.

    Parameters
    ----------
    stack : Stack
        The stack of this thread.
    leaving : bool
        Whether the innermost scope, or the thread's task, ends here. A scope restores its device itself, and its
        changes are dropped.
    failing : bool
        Whether an exception is leaving that scope; then no other is raised.
    current : int, optional
        The device that was current at the end of that scope; by default the one that is current now.
    """
    changes: list[Change] = stack.changes
    if not changes:
        return
    depth = len(stack)
    change = changes[-1]
    owner = stack[-1][1] if stack else process.owner
    try:
        if change.depth != depth or owner is None or owner.index < 0 or _is_running(change):
            return
        if current is None:
            current = accelerator.current_device()
        if current not in (change.after, owner.index):
            return  # Other code moved the device since, perhaps temporarily.
        _drop_changes(changes, depth)  # One change is one stray, whatever the verdict is.
        if current == owner.index:
            return
        where = "when its scope or task ended" if leaving else "at the next door"
        note = f"it was cuda:{change.before}; found {where}"
        moves = judge(NAME, f"cuda:{current}", owner, 0, _ADVICE, target=owner.tag, note=note, origin=change.origin)
        if moves and not (leaving and stack):
            accelerator.bind().to(owner.index)
    except StrayDeviceError:
        if not failing:
            raise
    finally:
        if leaving:
            _drop_changes(changes, depth)
        mark_changes(stack)


def _drop_changes(changes: list[Change], depth: int) -> None:
    """Drop the changes made in the scope at `depth` and in the scopes inside it."""
    while changes and changes[-1].depth >= depth:
        changes.pop()


def _is_running(change: Change) -> bool:
    """Return whether the code that made a change is still running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is change.code and id(frame) == change.frame:
            return True
        frame = frame.f_back
    return False
