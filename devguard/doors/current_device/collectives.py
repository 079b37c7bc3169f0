"""The door ``collectives``: ``torch.distributed`` guesses a device where the program names none.

Three guesses, all of them by the place of a process among the others, which says nothing about the GPU it owns:

- ``barrier()`` on NCCL, before any other collective of its group: "global rank modulo number of devices", whatever the
  current device is. It gets ``device_ids=[owner]``. A group that has communicated knows its device, and is left alone.
- NCCL groups of torch 2.15 and later, at ``init_process_group`` and ``new_group``: the same guess, or ``LOCAL_RANK``
  modulo the number of devices, and the group keeps to it. It gets the owner. Older torch opens nothing there, so
  ``device_id=`` is never put in: it would make every group connect at once, which some programs cannot bear.
- Object collectives and their byte tensors: the current device. On a thread that has chosen none that is device 0,
  and it becomes the owner while device 0 holds no context. A device that somebody chose is never overruled.

Only where the guess is not the owner is there a stray. A device that the program names itself is obeyed, and recorded
as kept (``barrier(device_ids=...)``; refused in mode ``error``). What object collectives carry is for the door
``load``.

Not here: gloo and other backends that work on the host; the device of a tensor that a collective is given;
``init_device_mesh``, which calls ``set_device`` (door ``set_device``). A ``cpu`` owner has no device to put in: a guess
is recorded and left alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal, refused
from devguard.reporting.verdict import judge
from devguard.support.patching import DoorError, Patches

__all__ = ["install", "status", "uninstall"]

NAME = "collectives"

_patches = Patches()
_ADVICE_BARRIER = (
    "Nobody has told this group its device, so barrier() guesses. Pass device_ids=[...], communicate with a tensor "
    "first, or let devguard do it (mode='repair')."
)
_ADVICE_GROUP = (
    "torch guesses the device of this group from the rank. Pass device_id= to init_process_group, or let devguard do "
    "it (mode='repair')."
)
_ADVICE_OBJECTS = (
    "This thread has chosen no device, so the objects travel by way of device 0. Call torch.cuda.set_device first, or "
    "enter devguard.guard(...) on this thread."
)
_ADVICE_NAMED = (
    "The program names that device, which devguard never overrides. Correct it, or use devguard.unguarded()."
)


def install() -> None:
    """Replace ``barrier``, and torch's functions that choose a device; a torch without distributed has none."""
    import torch
    import torch.distributed as distributed

    if not distributed.is_available() or not hasattr(torch._C, "_cuda_hasPrimaryContext"):
        return
    from torch.distributed import distributed_c10d as c10d

    barrier = _barrier(_patches.find(c10d, "barrier"), c10d)
    for module in (distributed, c10d):
        _patches.replace(module, "barrier", barrier)
    _patches.replace(c10d, "_get_object_coll_device", _object_device(_patches.find(c10d, "_get_object_coll_device")))
    if "_nccl2_device" in vars(c10d):  # torch 2.15
        _patches.replace(c10d, "_nccl2_device", _group_device(_patches.find(c10d, "_nccl2_device")))


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is watched, and who holds copies from before."""
    watched = sorted(f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced)
    return {"watched": watched, "early_copies": _patches.early_copies()}


def _barrier(original: Callable[..., Any], c10d: Any) -> Callable[..., Any]:
    signature = inspect.signature(original)
    if not {"group", "device_ids"} <= set(signature.parameters):
        raise DoorError(
            f"torch.distributed.barrier of torch {sys.modules['torch'].__version__} takes {signature}; this version of "
            "devguard does not know it."
        )

    def barrier(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or in_force.mode_of(NAME) == "off":
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        named = given.get("device_ids")
        if named is not None:
            _obey(named, owner)
            return original(*args, **kwargs)
        backend = _unconnected(c10d, given.get("group"))
        if backend is None:
            return original(*args, **kwargs)
        guess = c10d.get_rank() % sys.modules["torch"].cuda.device_count()
        if guess == owner.index:
            repair = in_force.mode_of(NAME) == "repair"
        else:
            target = owner.tag if owner.index >= 0 else None
            repair = judge(NAME, f"cuda:{guess}", owner, 0, _ADVICE_BARRIER, target=target)
        return original(**{**given, "device_ids": [owner.index]}) if repair else original(*args, **kwargs)

    return barrier


def _obey(named: Any, owner: Owner) -> None:
    """Record devices that the program names itself, if they are not the owner's; refuse them in mode ``error``."""
    try:
        away = [f"cuda:{index}" for index in named if index != owner.index]
    except TypeError:
        return  # torch says what is wrong with it
    if not away or all(map(is_allowed, away)):
        return
    source = ",".join(away)
    if in_force.mode_of(NAME) == "error":
        raise refused(NAME, source, owner.tag, 0, _ADVICE_NAMED)
    journal.record(NAME, source, source, owner.tag, "kept", 0)


def _unconnected(c10d: Any, group: Any) -> Any:
    """Return the NCCL backend by which a barrier would guess a device; None where nothing is guessed.

    Nothing is guessed on the host, in a group that was given its device, and in one that has communicated. A backend
    that does not say whether it has (as beneath ``TORCH_DISTRIBUTED_DEBUG=DETAIL``) is left alone.
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


def _object_device(original: Callable[..., Any]) -> Callable[..., Any]:
    torch: Any = sys.modules["torch"]

    def _get_object_coll_device(*args: Any, **kwargs: Any) -> Any:
        device = original(*args, **kwargs)
        owner = in_force.owner_at_door() if device == "cuda" else None
        if owner is None or owner.index <= 0 or torch._C._cuda_getDevice() != 0 or torch._C._cuda_hasPrimaryContext(0):
            return device
        return owner.tag if judge(NAME, "cuda:0", owner, 0, _ADVICE_OBJECTS, target=owner.tag) else device

    return _get_object_coll_device


def _group_device(original: Callable[..., Any]) -> Callable[..., Any]:
    def _nccl2_device(opts: Any) -> Any:
        owner = in_force.owner_at_door()
        group = opts.process_group
        named = group is not None and group.bound_device_id is not None
        device = original(opts)  # opens nothing; it writes what it found into the group
        if owner is None or named or device is None or device.index == owner.index:
            return device
        if group is not None:
            group.bound_device_id = None  # for a group that is refused
        target = owner.tag if owner.index >= 0 else None
        if judge(NAME, str(device), owner, 0, _ADVICE_GROUP, target=target):
            device = owner.device
        if group is not None:
            group.bound_device_id = device
        return device

    return _nccl2_device
