"""The door ``first_touch``: the first initialisation of CUDA in this process, and where it was done.

It is a stray where the owner is ``cpu``: a tokenizer or router opens CUDA at all. In mode ``error`` it is refused
before the driver is initialised, and may be tried again. It is a stray as well if it came before this process had an
owner and left a context on another device than the first owner's: a tensor made at import time, a constructor. That is
recorded when the owner becomes known, with the line that did it; a context cannot be given back.

Every initialisation by torch ends in ``torch._C._cuda_init``, once in the life of a process, so that watching it costs
nothing afterwards. Not seen here: what needs CUDA without it (libraries and a bare ``torch.cuda.Stream()``: doors
``native`` and ``streams``), and what was before the door opened: ``status()`` says so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from devguard.doors import first_use
from devguard.doors.first_use import Touch
from devguard.modes import DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.prepare import on_prepare
from devguard.ownership.process import process, unguarded_contexts
from devguard.ownership.stack import local
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal
from devguard.reporting.stray import LEFT
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "first_touch"

_patches = Patches()
_late = False  # whether CUDA was initialised already when the door opened
_contexts_before: tuple[int, ...] = ()
_owned = False  # whether an owner of a GPU is known
_pending: Touch | None = None  # a touch that nobody owned, until the first owner of a GPU is known
_ADVICE = (
    "This process owns no GPU. Keep the work on the CPU, give it to a process that owns a GPU, or run it inside "
    "devguard.guard('cuda:...') or devguard.unguarded()."
)


def install() -> None:
    """Watch torch's initialisation of CUDA, if it is still to come; a build without CUDA has none."""
    global _late, _contexts_before, _pending, _owned
    import torch

    _pending, _owned = None, False
    _late = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    _contexts_before = accelerator.contexts()
    if hasattr(torch._C, "_cuda_getDeviceCount"):
        _patches.replace(torch._C, "_cuda_init", _watched(_patches.find(torch._C, "_cuda_init")))
    on_prepare.append(_owner_known)


def uninstall() -> list[str]:
    """Put torch's own function back. The record stays: it is true of the process."""
    if _owner_known in on_prepare:
        on_prepare.remove(_owner_known)
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return who initialised CUDA first, and whether that was before the door opened."""
    first = first_use.first()
    return {
        "first": first and first.as_dict(),
        "before_the_door_opened": _late,
        "contexts_before": [f"cuda:{index}" for index in _contexts_before],
    }


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    def _cuda_init(*args: Any) -> Any:
        global _pending
        owner = in_force.owner()
        # a GPU that may be used here must be initialised first
        stray = owner is not None and owner.index < 0 and not _some_allowed()
        if stray and owner is not None and in_force.mode_of(first_use.door()) == "error":
            judge(first_use.door(), "cuda", owner, 0, _ADVICE)  # raises
        result = original(*args)
        if process.adoption is not None:
            process.adoption.touched()
        unowned = not _owned and owner is None and not local.stack
        frame = sys._getframe(1)
        thread, module = threading.current_thread().name, callsite.module(frame)
        touch = Touch(callsite.origin(frame), os.getpid(), thread, time.time(), unowned, module)
        first_use.record(touch)
        if unowned:
            _pending = touch
        if stray and owner is not None:
            judge(first_use.door(), "cuda", owner, 0, _ADVICE)
        return result

    return _cuda_init


def _some_allowed() -> bool:
    return any(is_allowed(f"cuda:{index}") for index in range(accelerator.device_count()))


def _owner_known(owner: Owner, says: Callable[[str], DoorMode | None]) -> None:
    """Judge a touch that came before there was an owner, now that the first one of a GPU is known."""
    global _pending, _owned
    if owner.index < 0:
        return
    touch, _pending, _owned = _pending, None, True
    mode = says(NAME) or in_force.mode_of(NAME)
    if touch is None or touch.pid != os.getpid() or mode == "off":
        return
    foreign = [
        f"cuda:{index}"
        for index in accelerator.contexts()
        if index != owner.index and index not in unguarded_contexts and not is_allowed(f"cuda:{index}", touch.module)
    ]
    if foreign:
        tags = ",".join(foreign)
        action = LEFT.get(mode, "observed")
        note = f"before {owner.tag} was named as the owner; a context cannot be given back"
        journal.record(NAME, tags, tags, owner.tag, action, 0, origin=touch.origin, note=note)
