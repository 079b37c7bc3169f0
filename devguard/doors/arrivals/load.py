"""The door ``load``: tensors that are restored by the device tag written beside their storage.

A pickled tensor holds a ``torch.save`` of its storage. So all forms of ``torch.load``, and every plain pickle of a
tensor in any library, meet in one function of torch, ``torch.serialization._get_restore_location``. torch calls it once
per load with the load's ``map_location``, so an explicit ``map_location`` is known (map_locations.py); the supported
hook (``register_package``) does not show it. Mode ``error`` raises before the storage exists.

Not seen here: CUDA IPC, safetensors, ``torch.frombuffer``, and archives of ``torch.jit`` (door ``jit``). See
docs/doors.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from devguard.doors.arrivals import relayed_tags
from devguard.doors.arrivals.map_locations import (
    ADVICE,
    NAME,
    Restore,
    is_away,
    leaves_tag,
    obey_result,
    restorer_by_request,
)
from devguard.ownership import in_force
from devguard.ownership.adoption import Adoption
from devguard.ownership.owner import Owner, names_cuda
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting import allowlist
from devguard.reporting.verdict import judge
from devguard.support import accelerator, callsite
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

_patches = Patches()


def install() -> None:
    """Replace the two functions by which torch turns a tag into a device."""
    import torch

    original: Callable[[Any], Restore] = _patches.find(torch.serialization, "_get_restore_location")
    original_outer = _patches.find(torch._utils, "_get_restore_location")

    def _get_restore_location(map_location: Any) -> Restore:
        owner = in_force.owner_at_door()
        if owner is None:
            adoption = None if local.stack or map_location is not None else process.adoption
            restore = original(map_location)
            return restore if adoption is None else _restorer_without_owner(restore, adoption)
        by_tag = _restorer_by_tag(original(None), owner)
        if map_location is None:
            return by_tag
        return restorer_by_request(original, map_location, owner, by_tag)

    def _get_restore_location_of_outer(device: Any) -> Any:
        owner, tag = in_force.owner_at_door(), str(device)
        if owner is None or not is_away(tag, owner) or not leaves_tag(_map_location_in_force(), tag):
            return original_outer(device)
        if in_force.mode_of(NAME) != "repair" or allowlist.is_allowed(tag):
            return device
        return torch.device(owner.tag)

    _patches.replace(torch.serialization, "_get_restore_location", _get_restore_location)
    _patches.replace(torch._utils, "_get_restore_location", _get_restore_location_of_outer)
    relayed_tags.install(_patches)
    when_imported("torch.package.package_importer", _patch_package_importer)


def _patch_package_importer(module: Any) -> None:
    """Replace the copy of torch's function in torch.package, which may be imported after this door was opened."""
    for owner, name, original, ours in tuple(_patches.replaced):
        if owner is sys.modules["torch"].serialization and vars(module).get(name) is original:
            _patches.replace(module, name, ours)


def uninstall() -> list[str]:
    """Put torch's functions back."""
    relayed_tags.uninstall()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of torch's functions from before the door opened, and the counts of relayed tags."""
    return {"early_copies": _patches.early_copies(), "relay": relayed_tags.status()}


def _restorer_without_owner(restore: Restore, adoption: Adoption) -> Restore:
    """Return the restoring function for a load in a process that has no owner yet: the tags decide."""

    def restore_as_tagged(storage: Any, location: str) -> Any:
        if names_cuda(location):
            adoption.note_unowned(location)
        return restore(storage, location)

    return restore_as_tagged


def _restorer_by_tag(restore: Restore, owner: Owner) -> Restore:
    """Return the restoring function for a load in which the tags name the devices."""
    own = owner.tag

    def restore_on_owner(storage: Any, location: str) -> Any:
        if location == own or location == "cpu":
            return restore(storage, location)
        if not names_cuda(location):
            return obey_result(restore(storage, location), owner)
        source = location
        if location == "cuda" and owner.index >= 0:  # torch takes the current device
            current = accelerator.current_device_after_init()
            if current == owner.index:
                return restore(storage, own)
            source = f"cuda:{current}"
        try:
            start = sys._getframe(3)  # past the innermost two frames of torch's loader: this is a hot path
        except ValueError:  # torch's function was called directly, from almost no stack
            start = sys._getframe()
        if judge(NAME, source, owner, storage.nbytes(), ADVICE, own, start):
            return relayed_tags.keep(storage, location) if own == "cpu" else restore(storage, own)
        return restore(storage, location)

    return restore_on_owner


def _map_location_in_force() -> Any:
    """Return the ``map_location`` of the load that now rebuilds a tensor subclass; None without one.

    torch's own copy of the argument (``_serialization_tls``) is None in legacy files, holds the outer value in a pickle
    nested in a load, and is stale after a load that raised (seen in torch 2.13). So it is read from the load's frame.
    """
    serialization = sys.modules["torch"].serialization
    loaders = (serialization._load.__code__, serialization._legacy_load.__code__)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in loaders:
            return frame.f_locals["map_location"]
        if callsite.is_user(frame.f_code):
            return None  # a separate pickle, read by user code inside a load
        frame = frame.f_back
    return None
