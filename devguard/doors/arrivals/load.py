"""The door ``load``: tensors that are restored by the device tag written beside their storage.

A pickled tensor holds a ``torch.save`` of its storage. So all forms of ``torch.load``, and every plain pickle of a
tensor in any library, meet in one function of torch, ``torch.serialization._get_restore_location``. torch calls it once
per load with the load's ``map_location``, so an explicit ``map_location`` is known; the supported hook
(``register_package``) does not show it. Mode ``error`` raises before the storage exists, except where ``map_location``
is a function, which is judged by its result.

Not seen here: CUDA IPC, safetensors, ``torch.frombuffer``, and archives of ``torch.jit`` (door ``jit``). See
docs/doors.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import wrapt

from devguard.doors.arrivals import relayed_tags
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.verdict import judge, obey
from devguard.support import accelerator, callsite
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "load"

Restore = Callable[[Any, str], Any]

_patches = Patches()
_ADVICE = (
    "The bytes carry the sender's device. Pass map_location, send CPU tensors, or let devguard repair it "
    "(mode='repair')."
)


def install() -> None:
    """Replace the two functions by which torch turns a tag into a device."""
    import torch

    original: Callable[[Any], Restore] = _patches.find(torch.serialization, "_get_restore_location")
    original_outer = _patches.find(torch._utils, "_get_restore_location")

    def _get_restore_location(map_location: Any) -> Restore:
        restore = original(map_location)
        owner = in_force.owner_at_door()
        if owner is None:
            return restore
        if map_location is None:
            return _restorer_by_tag(restore, owner)
        return _restorer_by_request(restore, map_location, owner)

    def _get_restore_location_of_outer(device: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or not _is_away(str(device), owner) or _has_map_location(torch.serialization):
            return original_outer(device)
        return torch.device(owner.tag) if in_force.mode_of(NAME) == "repair" else device

    _patches.replace(torch.serialization, "_get_restore_location", _get_restore_location)
    _patches.replace(torch._utils, "_get_restore_location", _get_restore_location_of_outer)
    relayed_tags.install(_patches)

    # torch.package copies the function when it is imported, which may be after this door was opened.
    def patch_package_importer(module: Any) -> None:
        held = vars(module).get("_get_restore_location")
        if _patches.replaced and held is original:
            _patches.replace(module, "_get_restore_location", _get_restore_location)

    wrapt.register_post_import_hook(patch_package_importer, "torch.package.package_importer")


def uninstall() -> list[str]:
    """Put torch's functions back."""
    relayed_tags.uninstall()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of torch's functions from before the door opened, and the counts of relayed tags."""
    return {"early_copies": _patches.early_copies(), "relay": relayed_tags.status()}


def _restorer_by_tag(restore: Restore, owner: Owner) -> Restore:
    """Return the restoring function for a load without ``map_location``, where the tags name the devices."""
    own = owner.tag

    def restore_on_owner(storage: Any, location: str) -> Any:
        if location == own or location[:4] != "cuda":
            return restore(storage, location)
        if location == "cuda" and not _is_away(location, owner):
            return restore(storage, own)
        try:
            start = sys._getframe(3)  # past the innermost two frames of torch's loader: this is a hot path
        except ValueError:  # torch's function was called directly, from almost no stack
            start = sys._getframe()
        if judge(NAME, location, owner, storage.nbytes(), _ADVICE, own, start):
            return relayed_tags.keep(storage, location) if own == "cpu" else restore(storage, own)
        return restore(storage, location)

    return restore_on_owner


def _restorer_by_request(restore: Restore, map_location: Any, owner: Owner) -> Restore:
    """Return the restoring function for a load with an explicit ``map_location``, which is always obeyed.

    A device that is not the owner's is recorded as kept.
    """
    if isinstance(map_location, dict):

        def target_of(location: str) -> str | None:
            return str(map_location.get(location, location))
    elif isinstance(map_location, bytes):

        def target_of(location: str) -> str | None:
            return map_location.decode()
    elif callable(map_location) and not hasattr(map_location, "index"):

        def target_of(location: str) -> str | None:
            return None  # known only after the call
    else:
        fixed = str(map_location)

        def target_of(location: str) -> str | None:
            return fixed

    def restore_as_requested(storage: Any, location: str) -> Any:
        target = target_of(location)
        if target is not None and in_force.mode_of(NAME) == "error" and _is_away(target, owner):
            obey(NAME, target, owner, storage.nbytes())  # raises before anything is allocated
        restored = restore(storage, location)
        if target is None:
            target = str(restored.device)
        if _is_away(target, owner):
            obey(NAME, target, owner, restored.nbytes())
        return restored

    return restore_as_requested


def _is_away(location: str, owner: Owner) -> bool:
    """Return whether `location` is an accelerator that is not the owner's."""
    if not location.startswith("cuda") or location == owner.tag:
        return False
    if location == "cuda" and owner.index >= 0:  # torch takes the current device
        return accelerator.current_device_after_init() != owner.index
    return True


def _has_map_location(serialization: Any) -> bool:
    """Return whether the load that now rebuilds a tensor subclass was called with a ``map_location``.

    torch's own copy of the argument (``_serialization_tls``) is None in legacy files, holds the outer value in a pickle
    nested in a load, and is stale after a load that raised (seen in torch 2.13). So it is read from the load's frame.
    """
    loaders = (serialization._load.__code__, serialization._legacy_load.__code__)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in loaders:
            return frame.f_locals["map_location"] is not None
        if callsite.is_user(frame.f_code):
            return False  # a separate pickle, read by user code inside a load
        frame = frame.f_back
    return False
