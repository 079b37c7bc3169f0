"""The door ``interop``: a tensor of another framework that lies on a device that is not the owner's.

``torch.from_dlpack`` (and ``torch.utils.dlpack.from_dlpack``) makes a tensor of memory that another framework holds,
where it lies. Away from the owner that is recorded with the line that does it, and refused in mode ``error``: before
the tensor is made, or, for a bare capsule, which does not say where it lies, right after. It is never moved: the tensor
would no longer share the memory. With an explicit ``device=`` the program has chosen: recorded as kept.

Not seen: ``torch.as_tensor``, ``torch.asarray`` and ``torch.tensor`` of an object with ``__cuda_array_interface__``
(CuPy, Numba). torch reads it in C++ and asks nobody; only a Python function around those three could look, and the
smallest one that tells such objects from others made ``torch.as_tensor`` 1.09 x slower for a number or a list and 1.6 x
for a tensor (torch 2.13), and would stand in the way of ``torch.compile``, which knows them by identity. CuPy's arrays
are of C and cannot be watched either. Neither seen are libraries that keep a device of their own (FAISS, ONNX Runtime).
The contexts that all of them open are found by the door ``native``.
"""

from __future__ import annotations

from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal, refused
from devguard.reporting.verdict import judge
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
_ADVICE = "The memory lies there. Make it on the owner's device, or, if it is meant, take it in devguard.unguarded()."
_ADVICE_EXPLICIT = (
    "The program names that device itself, which devguard never overrides. Correct it, or allow it with "
    "devguard.unguarded()."
)


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
    """Put torch's own function back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return who holds copies of ``from_dlpack`` from before, and what cannot be watched."""
    return {"early_copies": _patches.early_copies(), "not_watched": list(NOT_WATCHED)}


def _judge_source(external: Any, owner: Owner) -> bool:
    """Let the verdict fall on memory that says where it lies; tell whether it does."""
    if not hasattr(external, "__dlpack_device__"):
        return False
    kind, index = external.__dlpack_device__()
    if int(kind) in _ON_GPU and index != owner.index:
        nbytes = getattr(external, "nbytes", 0)
        judge(NAME, f"cuda:{index}", owner, nbytes if isinstance(nbytes, int) else 0, _ADVICE)
    return True


def _judge_named(named: Any, owner: Owner) -> bool:
    """Record a device that the program asked for, or refuse it; tell whether it names one."""
    tag = str(named)
    if not tag.startswith("cuda:"):
        return tag != "cuda"  # torch takes the current device
    if tag != owner.tag and not is_allowed(tag):
        mode = in_force.mode_of(NAME)
        if mode == "error":
            raise refused(NAME, tag, owner.tag, 0, _ADVICE_EXPLICIT)
        if mode != "off":
            journal.record(NAME, tag, tag, owner.tag, "kept", 0)
    return True
