"""The door ``visibility``: an index that does not mean the physical GPU that its author thinks.

An owner is checked when it is entered for the first time; an owner that only the environment named, when its first
stray is handled. Two cases are strays: ``CUDA_VISIBLE_DEVICES`` was changed after CUDA had read it, and the owner's
index now means another GPU, or none (visible_devices.py); or two ranks of one job, or two children of one parent with
different settings, own one GPU. Each process claims its GPU (gpu_claims.py), and the later process records the stray.

Nothing can be repaired: CUDA reads the variable once, and devguard does not choose devices. Mode ``error`` raises, and
no scope is entered. A change that leaves the owner its GPU is no stray. docs/doors.md lists what cannot be seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.doors.contexts import gpu_claims, visible_devices
from devguard.doors.contexts.visible_devices import VARIABLE
from devguard.modes import DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner, owned_tags
from devguard.ownership.prepare import on_prepare
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.stray import Occurrence
from devguard.reporting.verdict import judge_too_late, refusal
from devguard.support import accelerator

__all__ = ["install", "status", "uninstall"]

NAME = "visibility"

_ADVICE_CHANGED = f"Set {VARIABLE} before CUDA is initialised, or start a new process with that value."
_ADVICE_SHARED = (
    f"Give each rank its own GPU: the index counts the devices in {VARIABLE}, not the devices of the machine. If the "
    f"ranks share a GPU on purpose, set doors={{'{NAME}': 'off'}} or {gpu_claims.VARIABLE}=off."
)


class _State:
    """The state of this door.

    Attributes
    ----------
    problem : str or None
        The error that made the last failed check fail.
    """

    def __init__(self) -> None:
        self.problem: str | None = None


_state = _State()


def install() -> None:
    """Check each owner before its first entry."""
    _state.problem = None
    if _check not in on_prepare:
        on_prepare.append(_check)


def uninstall() -> list[str]:
    """Check owners no longer, and release the claims."""
    if _check in on_prepare:
        on_prepare.remove(_check)
    gpu_claims.release()
    return []


def status() -> dict[str, Any]:
    """Return the physical GPUs that this process sees, and other processes that own its GPUs; initialises nothing."""
    row: dict[str, Any] = {
        "visible_now": os.environ.get(VARIABLE),
        "visible_at_start": visible_devices.visible_at_start(),
    }
    try:
        row["claims"] = str(gpu_claims.folder()) if gpu_claims.is_enabled() else "off"
        if accelerator.is_initialized() and not accelerator.is_in_bad_fork():
            gpus, visible = visible_devices.list_gpus(), visible_devices.list_visible()
            numbers = {gpu.uuid: number for number, gpu in enumerate(gpus)}
            row["devices"] = {
                f"cuda:{index}": {"uuid": uuid, "nvml_index": numbers.get(uuid)} for index, uuid in enumerate(visible)
            }
            meant = visible_devices.meant_now(gpus, visible)
            if meant is not None and meant != visible:
                row["changed"] = f"{VARIABLE} now means other devices than when CUDA read it"
            if gpu_claims.is_enabled():
                row["shared_with"] = {
                    tag: [str(claim) for claim in gpu_claims.others(visible[int(tag[5:])])]
                    for tag in owned_tags()
                    if tag != "cpu"
                }
    except Exception as error:  # noqa: BLE001 - whatever fails, the rest of the status is valid
        row["problem"] = f"{type(error).__name__}: {error}"
    if _state.problem:
        row["problem"] = _state.problem
    return row


def _check(owner: Owner, mode_of: Callable[[str], DoorMode | None]) -> None:
    """Check an owner that is about to be entered for the first time."""
    mode = mode_of(NAME) or in_force.mode_of(NAME)
    if owner.index < 0 or mode == "off" or is_allowed(owner.tag):
        return
    shared: str | None = None
    try:
        has_been_read = accelerator.driver_is_initialized()
        uuid = accelerator.uuid_of(owner.index)
        changed = _describe_change(owner, uuid) if has_been_read else None
        if gpu_claims.is_enabled():
            for other in gpu_claims.claim(uuid, owner.index):
                clash = gpu_claims.describe_clash(other, owner.index)
                if clash is not None:
                    shared = f"cuda:{owner.index} is GPU {uuid}, which {clash} also owns: {other}"
                    break
    except Exception as error:  # noqa: BLE001 - a failed check must not stop the program
        _state.problem = f"{type(error).__name__}: {error}"
        return
    if changed is not None:
        _report(owner, uuid, mode, changed, _ADVICE_CHANGED)
    if shared is not None:
        _report(owner, uuid, mode, shared, _ADVICE_SHARED)


def _report(owner: Owner, uuid: str, mode: DoorMode, note: str, advice: str) -> None:
    source = f"GPU-{uuid}"
    found = Occurrence(NAME, source, owner.tag, start=sys._getframe(1), note=note)
    if mode == "error":
        raise refusal(found, advice, note)
    judge_too_late(found, mode)


def _describe_change(owner: Owner, uuid: str) -> str | None:
    """Describe what a change of the variable, after CUDA had read it, means for `owner`; None if it means nothing."""
    now = os.environ.get(VARIABLE)
    if now == visible_devices.visible_at_start():
        return None
    gpus = visible_devices.list_gpus()
    meant = visible_devices.meant_now(gpus, visible_devices.list_visible())
    here = next((number for number, gpu in enumerate(gpus) if gpu.uuid == uuid), None)
    if meant is None or here is None or meant[owner.index : owner.index + 1] == [uuid]:
        return None
    if owner.index < len(meant):
        other = meant[owner.index]
        would = f"GPU {other}, NVML index {[gpu.uuid for gpu in gpus].index(other)}"
    else:
        would = "no device at all"
    value = "unset" if now is None else f"set to {now!r}"
    effect = f"{owner.tag} is GPU {uuid}, NVML index {here}, and would be {would}"
    return f"{VARIABLE} was {value} after CUDA had read it: {effect}"
