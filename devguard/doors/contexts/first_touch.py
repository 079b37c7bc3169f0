"""The door ``first_touch``: the first initialisation of CUDA in this process, and the line that did it.

It is a stray where the owner is ``cpu``, unless a guard for a GPU is entered there: mode ``error`` refuses it before
the driver is initialised, and the call may be repeated later. It is also a stray if it came before there was an owner
and left a context on another device than the first owner's. This is recorded when the owner becomes known; a context
cannot be closed again. Contexts that later lines opened belong to the door ``native``.

Every initialisation by torch ends in ``torch._C._cuda_init``, once in the life of a process, so watching it costs
nothing afterwards. Calls that use CUDA without torch's initialisation get it first (uninitialised.py). Not seen:
libraries and operators that do so (door ``native``), and an initialisation before the door opened, which ``status()``
reports.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from devguard.doors import first_use
from devguard.doors.contexts import uninitialised
from devguard.doors.first_use import Touch
from devguard.modes import DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.prepare import on_prepare, prepare
from devguard.ownership.process import process, unguarded_contexts
from devguard.ownership.stack import local, take_first
from devguard.reporting.advice import advise
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.stray import Occurrence
from devguard.reporting.verdict import judge, judge_too_late
from devguard.support import accelerator, call_end, callsite
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "first_touch"

_patches = Patches()
_ADVICE = advise(NAME)
_NOTE = "this process owns no GPU: keep the work on the CPU, without pin_memory, or give it to a process that owns one"
# Functions of torch that choose a device for good, and of devguard, for a guard: the owner's must not be opened before.
_CHOOSING = frozenset({"set_device", "set_device_index", "set_stream", "move", "choose", "prepare"})
_USING = frozenset({"first_initialised"})  # uninitialised.py
# What initialises CUDA where a scope with a GPU is entered, or a GPU becomes the owner of the process.
_ENTERING = (prepare.__code__, take_first.__code__)


class _State:
    """The state of this door.

    Attributes
    ----------
    opened_late : bool
        Whether CUDA was initialised already when the door opened.
    contexts_before : tuple of int
        The devices that held a context at that moment.
    is_owned : bool
        Whether an owner of a GPU is known.
    pending : Touch or None
        A touch without an owner, until the first owner of a GPU is known.
    opened : tuple of int or None
        The devices with a context when the call of that touch had returned; None if that is unknown.
    """

    def __init__(self) -> None:
        self.opened_late = False
        self.contexts_before: tuple[int, ...] = ()
        self.is_owned = False
        self.pending: Touch | None = None
        self.opened: tuple[int, ...] | None = None


_state = _State()


def install() -> None:
    """Watch torch's initialisation of CUDA, if it is still to come; a build without CUDA has none."""
    import torch

    _state.pending, _state.is_owned = None, False
    _state.opened_late = accelerator.is_initialized()
    _state.contexts_before = accelerator.contexts()
    if hasattr(torch._C, "_cuda_getDeviceCount"):
        _patches.replace(torch._C, "_cuda_init", _wrap(_patches.find(torch._C, "_cuda_init")))
        uninitialised.patch(_patches)
    on_prepare.append(_judge_early_touch)


def uninstall() -> list[str]:
    """Restore torch's own function. The record stays: it holds for the process."""
    if _judge_early_touch in on_prepare:
        on_prepare.remove(_judge_early_touch)
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the first initialisation of CUDA, and whether CUDA was initialised before the door opened."""
    first = first_use.first()
    return {
        "first": first and first.as_dict(),
        "before_the_door_opened": _state.opened_late,
        "contexts_before": [f"cuda:{index}" for index in _state.contexts_before],
    }


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def _cuda_init(*args: Any) -> Any:
        owner = in_force.owner()
        # A GPU that is allowed here, or that becomes the owner, can be used only after CUDA is initialised.
        stray = (
            owner is not None and owner.index < 0 and not _is_entering(sys._getframe(1)) and not _is_some_gpu_allowed()
        )
        if stray and owner is not None and in_force.mode_of(first_use.door()) == "error":
            judge(first_use.door(), "cuda", owner, 0, _ADVICE, note=_NOTE)  # raises
        result = original(*args)
        frame = sys._getframe(1)
        if process.adoption is not None:
            process.adoption.make_owner_current(
                chooses=_is_inside(frame, _CHOOSING), uses_current=_is_inside(frame, _USING)
            )
        unowned = not _state.is_owned and owner is None and not local.stack
        thread, module = threading.current_thread().name, callsite.module_of(frame)
        touch = Touch(callsite.origin_of(frame), os.getpid(), thread, time.time(), unowned, module)
        first_use.record(touch)
        if unowned:
            _state.pending, _state.opened = touch, None
            call_end.call_afterwards(frame, _look_after_touch)
        if stray and owner is not None:
            judge(first_use.door(), "cuda", owner, 0, _ADVICE, note=_NOTE)
        return result

    return _cuda_init


def _is_inside(start: FrameType, functions: frozenset[str]) -> bool:
    """Return whether the call that the user's code is making goes through one of these functions."""
    frame: FrameType | None = start
    while frame is not None and not callsite.is_user(frame.f_code):
        if frame.f_code.co_name in functions:
            return True
        frame = frame.f_back
    return False


def _is_entering(start: FrameType) -> bool:
    """Return whether devguard itself initialises CUDA, for a GPU that the program names as the owner."""
    frame: FrameType | None = start
    while frame is not None and not callsite.is_user(frame.f_code):
        if frame.f_code in _ENTERING:
            return True
        frame = frame.f_back
    return False


def _look_after_touch() -> None:
    """Keep the contexts that the first touch has opened: later lines open others."""
    _state.opened = accelerator.contexts()


def _is_some_gpu_allowed() -> bool:
    return any(is_allowed(f"cuda:{index}") for index in range(accelerator.device_count()))


def _judge_early_touch(owner: Owner, mode_of: Callable[[str], DoorMode | None]) -> None:
    """Judge a touch that came before there was an owner, now that the first owner of a GPU is known."""
    if owner.index < 0:
        return
    touch, _state.pending, _state.is_owned = _state.pending, None, True
    mode = mode_of(NAME) or in_force.mode_of(NAME)
    if touch is None or touch.pid != os.getpid() or mode == "off":
        return
    opened = accelerator.contexts() if _state.opened is None else _state.opened
    foreign = [
        f"cuda:{index}"
        for index in opened
        if index != owner.index and index not in unguarded_contexts and not is_allowed(f"cuda:{index}", touch.module)
    ]
    if foreign:
        tags = ",".join(foreign)
        note = f"before {owner.tag} was named as the owner; a context cannot be closed again"
        judge_too_late(Occurrence(NAME, tags, owner.tag, note=note, origin=touch.origin), mode)
