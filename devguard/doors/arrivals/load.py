"""The door ``load``: everything that restores a tensor's storage by the device tag written beside it.

``torch.load`` in all its forms, and every plain pickle of a tensor, whoever unpickles it: a tensor inside a
pickle is a ``torch.save`` of its storage, so all of them meet in one function of torch,
``torch.serialization._get_restore_location``. It is asked once per load with the load's ``map_location``,
which makes an explicit one known from none; the supported hook (``register_package``) cannot tell them
apart.

Not seen here: CUDA IPC, safetensors, ``torch.frombuffer``, and archives of ``torch.jit`` (door ``jit``).
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
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal, refused
from devguard.reporting.verdict import judge
from devguard.support import callsite
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "load"

Restore = Callable[[Any, str], Any]

_patches = Patches()
_ADVICE_TAG = (
    "The bytes carry the sender's device. Pass map_location, send CPU tensors, or let devguard repair it "
    "(mode='repair')."
)
_ADVICE_EXPLICIT = (
    "The program asks for that device with map_location, which devguard never overrides. Correct it, or allow it "
    "with devguard.unguarded()."
)


def install() -> None:
    """Replace torch's two ways from a tag to a device."""
    import torch

    original: Callable[[Any], Restore] = _patches.find(torch.serialization, "_get_restore_location")
    original_outer = _patches.find(torch._utils, "_get_restore_location")

    def _get_restore_location(map_location: Any) -> Restore:
        restore = original(map_location)
        owner = in_force.owner_at_door()
        if owner is None:
            return restore
        return _by_tag(restore, owner) if map_location is None else _by_request(restore, map_location, owner)

    def _get_restore_location_of_outer(device: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or not _is_away(str(device), owner) or _asked_explicitly(torch.serialization):
            return original_outer(device)
        return torch.device(owner.tag) if in_force.mode_of(NAME) == "repair" else device

    _patches.replace(torch.serialization, "_get_restore_location", _get_restore_location)
    _patches.replace(torch._utils, "_get_restore_location", _get_restore_location_of_outer)
    relayed_tags.install(_patches)

    # torch.package keeps a copy of the function from its own import, which may come after ours
    def patch_package_importer(module: Any) -> None:
        held = vars(module).get("_get_restore_location")
        if _patches.replaced and held is original:
            _patches.replace(module, "_get_restore_location", _get_restore_location)

    wrapt.register_post_import_hook(patch_package_importer, "torch.package.package_importer")


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    relayed_tags.uninstall()
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is patched, who holds copies from before, and what was relayed."""
    return {"early_copies": _patches.early_copies(), "relay": relayed_tags.status()}


def _by_tag(restore: Restore, owner: Owner) -> Restore:
    """Return the restoring function of a load that leaves the device to the tags."""
    own = owner.tag

    def restore_on_owner(storage: Any, location: str) -> Any:
        if location == own or location[:4] != "cuda":
            return restore(storage, location)
        if location == "cuda" and not _is_away(location, owner):
            return restore(storage, own)
        try:
            start = sys._getframe(3)  # past the innermost two frames of torch's loader: this is a hot path
        except ValueError:  # torch's function is called by hand, from almost no stack
            start = sys._getframe()
        if judge(NAME, location, owner, storage.nbytes(), _ADVICE_TAG, own, start):
            return relayed_tags.keep(storage, location) if own == "cpu" else restore(storage, own)
        return restore(storage, location)

    return restore_on_owner


def _by_request(restore: Restore, map_location: Any, owner: Owner) -> Restore:
    """Return the restoring function of a load with an explicit ``map_location``: obeyed, recorded if it leads away."""
    if isinstance(map_location, dict):

        def target_of(location: str) -> str | None:
            return str(map_location.get(location, location))
    elif isinstance(map_location, bytes):

        def target_of(location: str) -> str | None:
            return map_location.decode()
    elif callable(map_location) and not hasattr(map_location, "index"):

        def target_of(location: str) -> str | None:
            return None  # only the callable knows
    else:
        fixed = str(map_location)

        def target_of(location: str) -> str | None:
            return fixed

    def restore_as_asked(storage: Any, location: str) -> Any:
        target = target_of(location)
        if target is not None and _refuses(target, owner):
            raise refused(NAME, target, owner.tag, storage.nbytes(), _ADVICE_EXPLICIT)
        restored = restore(storage, location)
        if target is None:
            target = str(restored.device)
            if _refuses(target, owner):
                raise refused(NAME, target, owner.tag, restored.nbytes(), _ADVICE_EXPLICIT)
        if _is_away(target, owner) and in_force.mode_of(NAME) != "off" and not is_allowed(target):
            journal.record(NAME, target, target, owner.tag, "kept", restored.nbytes())
        return restored

    return restore_as_asked


def _refuses(target: str, owner: Owner) -> bool:
    return _is_away(target, owner) and in_force.mode_of(NAME) == "error" and not is_allowed(target)


def _is_away(location: str, owner: Owner) -> bool:
    """Tell whether `location` is an accelerator that is not the owner's."""
    if not location.startswith("cuda") or location == owner.tag:
        return False
    if location == "cuda" and owner.index >= 0:  # torch takes the current device
        return bool(sys.modules["torch"].cuda.current_device() != owner.index)
    return True


def _asked_explicitly(serialization: Any) -> bool:
    """Tell whether the load that is rebuilding a tensor subclass now was given a ``map_location``.

    torch's own note of it (``_serialization_tls``) is None in legacy files, holds the outer value in a
    pickle nested in a load, and is stale after a load that raised (seen in torch 2.13). The frame of the
    load knows.
    """
    loaders = (serialization._load.__code__, serialization._legacy_load.__code__)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code in loaders:
            return frame.f_locals["map_location"] is not None
        if callsite.is_user(frame.f_code):
            return False  # a pickle of its own, inside user code that a load has called
        frame = frame.f_back
    return False
