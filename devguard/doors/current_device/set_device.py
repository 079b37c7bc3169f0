"""The door ``set_device``: a library changes the current device and does not put it back.

Watched are ``torch.cuda.set_device`` and ``set_stream``, ``torch.accelerator.set_device_index`` and ``set_stream``: the
calls that change the device for good. Of each change that may still be put back the thread's stack keeps who made it:
the call site, and the outermost frame of the package that it lies in, by code and identity. No frame is held.

- A set back to what was current before takes the change away: by anybody if that is the owner's device, else by the
  same package. So does a loop over the devices that comes back, a pair such as bitsandbytes' ``pre_call`` and
  ``post_call``, code that saves and restores.
- A change is a stray, and repaired by making the owner's device current, if it is found when its author has returned
  (that frame is off the stack) and the device is still where it left it: when a door next asks for the owner, when the
  guard is left, or when a task or thread ends. Until then it has time to put the device back.
- Code that nobody called, a program or the target of a thread, chooses its device for itself: its changes are no strays
  and are respected by what it calls. A package is known by its top-level name, so a program's own modules under another
  name count as libraries.

At the exit of a guard the device is given back in any case; in mode ``error`` the exit raises, unless the scope is left
by another exception.

The same watch lets a guard be left without asking the runtime for the current device: a scope whose device was current
already has nothing to give back, unless one of these functions left its mark (`Stack.moved`) on the thread. What moves
the device for a while and puts it back by itself (``torch.cuda.device``, ``with stream``) needs no watch. C++ code that
calls ``cudaSetDevice`` is out of reach.
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
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite
from devguard.support.callsite import Origin
from devguard.support.patching import Patches

__all__ = ["MOVERS", "install", "status", "uninstall"]

NAME = "set_device"

# What the functions above call in the end; not every torch has all of them.
MOVERS = ("_cuda_setDevice", "_cuda_setStream", "_accelerator_setDeviceIndex", "_accelerator_setStream")

_patches = Patches()
_ADVICE = (
    "The code there changes the current device and returns without putting it back. Use torch.cuda.device(...) as a "
    "context manager there, or set the device back after the call."
)


class Change(NamedTuple):
    """One change of the current device that may still be put back.

    Attributes
    ----------
    depth : int
        How many scopes the thread had entered.
    before, after : int
        The devices.
    package : str
        The package of the code that made it.
    code, frame : code object, int
        The outermost frame of that package, and its identity.
    origin : Origin
        Where it was made.
    """

    depth: int
    before: int
    after: int
    package: str
    code: CodeType
    frame: int
    origin: Origin


def install() -> None:
    """Watch `MOVERS`; a build without CUDA has none that matter."""
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    _patches.find(torch._C, "_cuda_setDevice")
    for name in MOVERS:
        if hasattr(torch._C, name):
            _patches.replace(torch._C, name, _watched(_patches.find(torch._C, name), torch._C._cuda_getDevice))
    watch_moves(_judge_pending)


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    unwatch_moves()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is watched, and how many changes of this thread may still be put back."""
    watched = [f"{owner.__name__}.{name}" for owner, name, _, _ in _patches.replaced]
    return {"watched": watched, "pending": len(local.stack.changes)}


def _watched(original: Callable[..., Any], get_device: Callable[[], int]) -> Callable[..., Any]:
    """Return `original` with an eye on the device before and after it."""

    def move(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        stack.moved = bool(stack)  # outside of scopes nobody has a device to give back
        owner = stack[-1][1] if stack else process.owner
        adoption = None if stack else process.adoption
        follows = False
        if adoption is not None and adoption.watches():
            follows = not _is_ours(sys._getframe(1)) and not _is_block(sys._getframe(1))
        if (owner is None or owner.index < 0) and not stack.changes and not follows:
            return original(*args, **kwargs)
        before = get_device()
        result = original(*args, **kwargs)
        after = get_device()
        if adoption is not None and follows:
            settled = adoption.frozen
            adoption.moved(after, sys._getframe(1))
            if not settled:
                return result  # a process that is still choosing its device strays from none
        if after != before:
            _note(stack, owner, before, after, sys._getframe(1))
            mark_changes(stack)
        return result

    return move


def _note(stack: Stack, owner: Owner | None, before: int, after: int, start: FrameType) -> None:
    """Keep a change in mind, or forget the one that it puts back."""
    changes: list[Change] = stack.changes
    depth = len(stack)
    home = owner is not None and owner.index == after
    if home and changes and changes[0].depth == depth and changes[0].before == after:  # the usual way back
        changes.clear()
        return
    if _is_ours(start):
        return  # a scope takes its device
    author = _author(start)
    package, outermost = author or ("", start)
    for position, change in enumerate(changes):
        if change.depth == depth and change.before == after and (home or change.package == package):
            del changes[position:]
            return
    if (
        author is None
        or owner is None
        or owner.index < 0
        or in_force.mode_of(NAME) == "off"
        or is_allowed(f"cuda:{after}")
    ):
        _drop(changes, depth)
        return
    for position, change in enumerate(changes):
        if change.depth == depth and change.package == package:
            before = change.before
            del changes[position:]
            break
    origin = callsite.origin(start)
    changes.append(Change(depth, before, after, package, outermost.f_code, id(outermost), origin))


def _is_ours(start: FrameType) -> bool:
    """Tell whether devguard calls, by itself or through one function of torch."""
    ours = __name__.partition(".")[0] + "."
    return any(
        frame.f_globals.get("__name__", "").startswith(ours) and not callsite.is_user(frame.f_code)
        for frame in (start, start.f_back)
        if frame is not None
    )


def _is_block(start: FrameType) -> bool:
    """Tell whether a ``with torch.cuda.stream(...)`` calls, which is no choice: it puts the device back by itself."""
    frame: FrameType | None = start
    while frame is not None and frame.f_globals.get("__name__") == "torch.cuda":
        if frame.f_code.co_name in ("__enter__", "__exit__"):
            return True
        frame = frame.f_back
    return False


def _author(start: FrameType) -> tuple[str, FrameType] | None:
    """Return the package that the user's own frame at `start` lies in, and the outermost frame of that package.

    None if no other package is further out: then nobody called it.
    """
    package: str | None = None
    outermost, called = start, False
    frame: FrameType | None = start
    while frame is not None:
        if callsite.is_user(frame.f_code):
            name = _package(frame)
            if package is None or name == package:
                package, outermost, called = name, frame, False
            else:
                called = True
        frame = frame.f_back
    return (package, outermost) if package is not None and called else None


def _package(frame: FrameType) -> str:
    """Return the top-level name of the module that a frame runs in; that of its package for ``python -m``."""
    name = frame.f_globals.get("__package__") or frame.f_globals.get("__name__") or ""
    return str(name).partition(".")[0]


def _judge_pending(stack: Stack, *, leaving: bool = False, failing: bool = False) -> None:
    """Judge the newest change of the innermost scope, if its author has returned.

    Parameters
    ----------
    stack : Stack
        The stack of this thread.
    leaving : bool
        Whether the innermost scope, or the thread's task, ends here: it gives the device back by itself, and nothing of
        it is pending any more.
    failing : bool
        Whether an exception is on its way out of that scope; no other one is raised over it.
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
        torch = sys.modules["torch"]
        current = torch._C._cuda_getDevice()
        if current not in (change.after, owner.index):
            return  # somebody else moved it, perhaps for a while
        _drop(changes, depth)  # one change is one stray, whatever becomes of it
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
            _drop(changes, depth)
        mark_changes(stack)


def _drop(changes: list[Change], depth: int) -> None:
    """Forget the changes that belong to the scope at `depth` and to scopes inside it."""
    while changes and changes[-1].depth >= depth:
        changes.pop()


def _is_running(change: Change) -> bool:
    """Tell whether the author of a change is still on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is change.code and id(frame) == change.frame:
            return True
        frame = frame.f_back
    return False
