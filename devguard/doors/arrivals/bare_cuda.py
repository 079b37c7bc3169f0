"""The door ``bare_cuda``: safetensors takes ``"cuda"`` without an index for GPU 0.

In torch a bare ``"cuda"`` is the current device. In safetensors (0.2 to 0.8) it is GPU 0, whatever device is current,
so each rank loads its checkpoint onto GPU 0. Inside a guard it means the owner. A device that the program names
(``"cuda:1"``, ``0``, and ``"cuda"`` where the owner is ``cpu``) is recorded as kept and never overridden.

``safe_open`` is a Rust class that cannot be subclassed. The class in its place creates the original objects, and passes
on ``isinstance`` checks and attributes; only ``type(f) is safe_open`` differs. Not watched: torchcodec's decoders, ONNX
Runtime, FAISS, CuPy and Numba, which take the device in C++. The door ``native`` finds their contexts. See
docs/doors.md.
"""

from __future__ import annotations

import operator
import sys
from types import ModuleType
from typing import Any, NoReturn

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.advice import OR_REPAIR, advise
from devguard.reporting.verdict import judge, obey
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "bare_cuda"

MODULES = ("safetensors", "safetensors.torch")
GPU_0 = "cuda:0"  # what safetensors takes "cuda" for
_DEVICE_POSITION = 2  # safe_open(filename, framework, device)

_ADVICE = f"{advise(NAME)} {OR_REPAIR}"

_patches = Patches()


class _State:
    """What the door has patched.

    Attributes
    ----------
    is_open : bool
        Whether the door is open. Copies of our class outlive it.
    missing : list of str
        The functions that this safetensors lacks.
    opener : _Opener or None
        The class in the place of ``safe_open``.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.missing: list[str] = []
        self.opener: _Opener | None = None


_state = _State()


class _Opener(type):
    """The type of the class in the place of ``safe_open``; a call of that class returns an object of the original."""

    original: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door() if _state.is_open else None
        if owner is not None:
            args, kwargs = _with_device(owner, args, kwargs)
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


def _refuse_subclass(cls: type) -> NoReturn:
    raise TypeError("type 'builtins.safe_open' is not an acceptable base type")  # as the original does


def install() -> None:
    """Replace ``safe_open`` in safetensors, now or when it is imported."""
    _state.is_open = True
    _state.missing.clear()
    for name in MODULES:
        when_imported(name, _patch_module)


def uninstall() -> list[str]:
    """Put the original back."""
    _state.is_open = False
    left = _patches.restore()
    for module in filter(None, map(sys.modules.get, MODULES)):
        held = vars(module).get("safe_open")
        if isinstance(held, _Opener):  # copied from safetensors while it was imported
            vars(module)["safe_open"] = held.original
    _state.opener = None
    return left


def status() -> dict[str, Any]:
    """Return what is watched, and the copies of the original from before the door opened."""
    row: dict[str, Any] = {
        "watched": [f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced],
        "early_copies": [copy for copy in _patches.early_copies() if not copy.startswith("safetensors.")],
    }
    if _state.missing:
        row["problem"] = f"not in this safetensors: {', '.join(_state.missing)}"
    return row


def _patch_module(module: ModuleType) -> None:
    """Replace ``safe_open`` in one module of safetensors."""
    if not _state.is_open or _patches.has(module):
        return
    original = vars(module).get("safe_open")
    if original is None:
        if module.__name__ == "safetensors":  # safetensors.torch may still be importing, and then copies ours
            _state.missing.append("safetensors.safe_open")
        return
    if isinstance(original, _Opener):
        return
    if _state.opener is None or _state.opener.original is not original:
        members = {"original": original, "__init_subclass__": classmethod(_refuse_subclass)}
        _state.opener = _Opener("safe_open", (), members)
    _patches.replace(module, "safe_open", _state.opener)


def _with_device(owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``safe_open`` with the owner in place of a bare ``"cuda"``."""
    positional = len(args) > _DEVICE_POSITION
    named = args[_DEVICE_POSITION] if positional else kwargs.get("device")
    tag = _tag_of(named)
    if tag is None or tag == owner.tag:
        return args, kwargs
    if named != "cuda" or owner.index < 0:
        obey(NAME, tag, owner)
    elif judge(NAME, tag, owner, 0, _ADVICE, target=owner.tag):
        if positional:
            return (*args[:_DEVICE_POSITION], owner.tag, *args[_DEVICE_POSITION + 1 :]), kwargs
        return args, {**kwargs, "device": owner.tag}
    return args, kwargs


def _tag_of(named: Any) -> str | None:
    """Return the CUDA device for which safetensors takes `named`; None if `named` is another device or not valid."""
    if isinstance(named, str):
        return GPU_0 if named == "cuda" else named if named.startswith("cuda:") else None
    try:
        index = operator.index(named)
    except TypeError:
        return None
    return f"cuda:{index}" if index >= 0 else None
