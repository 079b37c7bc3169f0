"""The door ``interop``: ``torch.from_dlpack`` of memory on a device that is not the owner's.

The tensor stays on the device of the memory, because a moved tensor would no longer share the memory. The call is
recorded. Mode ``error`` refuses before the tensor exists; the device of a bare capsule is read from DLPack's own
structure. A device that the program names with ``device=`` is recorded as kept.

Not seen: ``torch.as_tensor``, ``torch.asarray`` and ``torch.tensor`` of objects with ``__cuda_array_interface__``.
torch reads it in C++. The smallest Python function that would recognise such objects made ``torch.as_tensor`` 1.09 x
slower for a number or a list and 1.6 x for a tensor (torch 2.13), and ``torch.compile`` knows these three functions by
identity. The door ``native`` finds the contexts. See docs/doors.md.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.advice import advise
from devguard.reporting.verdict import judge, obey
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "interop"

# DLDeviceType of dlpack.h: kDLCUDA, kDLROCM and kDLCUDAManaged
_ON_GPU = frozenset({2, 10, 13})
NOT_WATCHED = (
    "torch.as_tensor, torch.asarray and torch.tensor of objects with __cuda_array_interface__",
    "torch._C._from_dlpack",
)

_patches = Patches()
_ADVICE = advise(NAME)


def install() -> None:
    """Replace both names of ``from_dlpack``."""
    import torch
    import torch.utils.dlpack

    original = _patches.find(torch.utils.dlpack, "from_dlpack")

    def from_dlpack(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None:
            return original(*args, **kwargs)
        external = args[0] if args else kwargs.get("ext_tensor")
        named = kwargs.get("device")
        judged = _judge_named(named, owner) if named is not None else _judge_source(external, owner)
        tensor = original(*args, **kwargs)
        if not judged and tensor.is_cuda and tensor.get_device() != owner.index:
            known = {"dtype": str(tensor.dtype), "shape": tensor.shape}
            judge(NAME, f"cuda:{tensor.get_device()}", owner, tensor.nbytes, _ADVICE, **known)
        return tensor

    for module in (torch, torch.utils.dlpack):
        _patches.replace(module, "from_dlpack", from_dlpack)


def uninstall() -> list[str]:
    """Put torch's function back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of ``from_dlpack`` from before the door opened, and what cannot be watched."""
    return {"early_copies": _patches.early_copies(), "not_watched": list(NOT_WATCHED)}


def _judge_source(external: Any, owner: Owner) -> bool:
    """Judge the memory of an object that names its device, or of a capsule; return whether the device is known."""
    nbytes: Any = 0
    if hasattr(external, "__dlpack_device__"):
        kind, index = external.__dlpack_device__()
        nbytes = getattr(external, "nbytes", 0)
    else:
        found = _read_capsule(external)
        if found is None:
            return False
        kind, index, nbytes = found
    if int(kind) in _ON_GPU and index != owner.index:
        judge(NAME, f"cuda:{index}", owner, nbytes if isinstance(nbytes, int) else 0, _ADVICE)
    return True


class _Tensor(ctypes.Structure):
    """The beginning of DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


# Where DLTensor begins in the structure that a capsule of this name holds.
_CAPSULES = {b"dltensor": 0, b"dltensor_versioned": 32}


def _read_capsule(capsule: Any) -> tuple[int, int, int] | None:
    """Return the kind and index of a capsule's device, and the bytes of its tensor; None if it is no DLPack capsule."""
    if type(capsule).__name__ != "PyCapsule":
        return None
    api = ctypes.PyDLL(None)
    for name, offset in _CAPSULES.items():
        if api.PyCapsule_IsValid(ctypes.py_object(capsule), name):
            get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
            tensor = _Tensor.from_address(get(capsule, name) + offset)
            count = math.prod(tensor.shape[axis] for axis in range(tensor.dimensions))
            return tensor.kind, tensor.index, count * tensor.bits * tensor.lanes // 8
    return None


def _judge_named(named: Any, owner: Owner) -> bool:
    """Record or refuse the device that the program names; return False if only the tensor shows the device."""
    tag = str(named)
    if not tag.startswith("cuda:"):
        return tag != "cuda"  # torch takes the current device
    if tag != owner.tag:
        obey(NAME, tag, owner)
    return True
