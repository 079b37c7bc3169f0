"""The door ``collectives``: ``torch.distributed`` guesses a device where the program names none.

torch guesses in three places, by the rank or the current device, which need not be the owner's: ``barrier()`` on NCCL
before any other collective of its group, NCCL groups of torch 2.15 and later, and object collectives. The door
puts in the owner if the guess is another device. A device that the program names is obeyed, and recorded as ``kept``
(refused in mode ``error``). ``device_id=`` is never passed to ``init_process_group``: every group would connect at
once, and some programs hang then.

Not watched: gloo and other backends on the host, the device of the tensors that a collective receives, the objects in
object collectives (door ``load``), and ``init_device_mesh``, which calls ``set_device``. See docs/doors.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.verdict import judge, obey
from devguard.support import accelerator
from devguard.support.patching import Patches, unsupported

__all__ = ["install", "status", "uninstall"]

NAME = "collectives"

_patches = Patches()
_ADVICE_BARRIER = (
    "This group has no device yet, so barrier() guesses one from the rank. Pass device_ids=[...], run a collective on "
    "a tensor first, or use mode='repair'."
)
_ADVICE_GROUP = (
    "torch guesses the device of this group from the rank. Pass device_id= to init_process_group, or use mode='repair'."
)
_ADVICE_OBJECTS = (
    "This thread has chosen no device, so the objects go through device 0. Call torch.cuda.set_device first, or enter "
    "devguard.guard(...) on this thread."
)


def install() -> None:
    """Replace ``barrier`` and torch's functions that choose a device, unless torch is built without distributed."""
    import torch
    import torch.distributed as distributed

    if not distributed.is_available() or not hasattr(torch._C, "_cuda_hasPrimaryContext"):
        return
    from torch.distributed import distributed_c10d as c10d

    barrier = _wrap_barrier(_patches.find(c10d, "barrier"), c10d)
    for module in (distributed, c10d):
        _patches.replace(module, "barrier", barrier)
    _patches.replace(
        c10d, "_get_object_coll_device", _wrap_object_device(_patches.find(c10d, "_get_object_coll_device"))
    )
    if "_nccl2_device" in vars(c10d):  # torch 2.15
        _patches.replace(c10d, "_nccl2_device", _wrap_group_device(_patches.find(c10d, "_nccl2_device")))


def uninstall() -> list[str]:
    """Restore torch's own functions."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the watched functions, and the names that hold copies from before the door opened."""
    watched = sorted(f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced)
    return {"watched": watched, "early_copies": _patches.early_copies()}


def _wrap_barrier(original: Callable[..., Any], c10d: Any) -> Callable[..., Any]:
    signature = inspect.signature(original)
    if not {"group", "device_ids"} <= set(signature.parameters):
        raise unsupported("torch.distributed.barrier", f"has other parameters, {signature}")

    def barrier(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or in_force.mode_of(NAME) == "off":
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        named = given.get("device_ids")
        if named is not None:
            _obey_named(named, owner)
            return original(*args, **kwargs)
        backend = _find_unconnected(c10d, given.get("group"))
        if backend is None:
            return original(*args, **kwargs)
        guess = c10d.get_rank() % accelerator.device_count()
        if guess == owner.index:
            repair = in_force.mode_of(NAME) == "repair"
        else:
            target = owner.tag if owner.index >= 0 else None
            repair = judge(NAME, f"cuda:{guess}", owner, 0, _ADVICE_BARRIER, target=target)
        return original(**{**given, "device_ids": [owner.index]}) if repair else original(*args, **kwargs)

    return barrier


def _obey_named(named: Any, owner: Owner) -> None:
    """Record devices that the program names itself, if another than the owner is among them."""
    try:
        away = [f"cuda:{index}" for index in named if index != owner.index]
    except TypeError:
        return  # torch itself raises the error for such an argument.
    if away:
        obey(NAME, ",".join(away), owner)


def _find_unconnected(c10d: Any, group: Any) -> Any:
    """Return the NCCL backend for which a barrier would guess a device; None where nothing is guessed.

    Nothing is guessed on the host, in a group with a bound device, or in a group that has communicated. A backend that
    does not report whether it has communicated, as with ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, is left alone.
    """
    if not c10d.is_initialized() or c10d._rank_not_in_group(group):
        return None
    group = group or c10d._get_default_group()
    if getattr(group, "bound_device_id", None) is not None or "nccl" not in str(c10d.get_backend(group)):
        return None
    try:
        backend = group._get_backend(sys.modules["torch"].device("cuda"))
    except RuntimeError:
        return None
    connected = getattr(backend, "_is_initialized", None)
    return backend if connected is not None and not connected() else None


def _wrap_object_device(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_object_coll_device(*args: Any, **kwargs: Any) -> Any:
        device = original(*args, **kwargs)
        owner = in_force.owner_at_door() if device == "cuda" else None
        if owner is None or owner.index <= 0 or not accelerator.device_0_is_unchosen():
            return device
        return owner.tag if judge(NAME, "cuda:0", owner, 0, _ADVICE_OBJECTS, target=owner.tag) else device

    return _get_object_coll_device


def _wrap_group_device(original: Callable[..., Any]) -> Callable[..., Any]:
    def _nccl2_device(opts: Any) -> Any:
        owner = in_force.owner_at_door()
        group = opts.process_group
        named = group is not None and group.bound_device_id is not None
        device = original(opts)  # opens nothing, and writes the device into the group
        if owner is None or named or device is None or device.index == owner.index:
            return device
        if group is not None:
            group.bound_device_id = None  # A refused group must keep no device.
        target = owner.tag if owner.index >= 0 else None
        if judge(NAME, str(device), owner, 0, _ADVICE_GROUP, target=target):
            device = sys.modules["torch"].device(owner.tag)
        if group is not None:
            group.bound_device_id = device
        return device

    return _nccl2_device
