"""The door ``bare_cuda``: a library outside torch is told ``"cuda"`` without an index and takes GPU 0 for it.

To torch a bare ``"cuda"`` is the current device. To safetensors (0.2 to 0.8) it is GPU 0, whatever is current; so
``safe_open``, ``load_file`` and ``load_model`` with ``device="cuda"`` put a checkpoint onto GPU 0 in every rank. Inside
a guard it means the owner; also inside a ``with torch.cuda.device(...)``, which safetensors does not look at either.
A device that the program names (``"cuda:1"``, ``0``) is explicit: it is recorded as kept, refused in mode ``error``,
and never overridden. So is ``"cuda"`` where the owner is ``cpu``. safetensors refuses ``torch.device`` objects by
itself, and ``safetensors.torch.load`` knows no device.

``safe_open`` is a class of Rust that cannot be subclassed. What stands in its place while the door is open makes the
real object, answers ``isinstance`` for it, and passes every attribute on; only ``type(f) is safe_open`` differs. Who
did ``from safetensors import safe_open`` before the door opened holds the original, and passes the door by: `status`
names them. ``load_file`` looks ``safe_open`` up when it is called, so copies of it are no matter.

Not watched, because they take the device natively: torchcodec's decoders, ONNX Runtime, FAISS, CuPy, Numba. Give them
an index. What they open elsewhere, the door ``native`` finds afterwards.
"""

from __future__ import annotations

import operator
import sys
from types import ModuleType
from typing import Any, NoReturn

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal, refused
from devguard.reporting.verdict import judge
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "bare_cuda"

MODULES = ("safetensors", "safetensors.torch")
GPU_0 = "cuda:0"  # what safetensors takes "cuda" for
_DEVICE_POSITION = 2  # safe_open(filename, framework, device)

_patches = Patches()
_open = False
_missing: list[str] = []
_ours: Any = None  # the _Opener that stands for safe_open
_ADVICE_BARE = "To safetensors 'cuda' is GPU 0. Name the device with its index, or let devguard do it (mode='repair')."
_ADVICE_EXPLICIT = (
    "The program names that device itself, which devguard never overrides. Correct it, or allow it with "
    "devguard.unguarded()."
)


class _Opener(type):
    """The type of the class that stands for ``safe_open``; calling that class gives an object of the original."""

    original: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door() if _open else None
        if owner is not None:
            args, kwargs = _settled(owner, args, kwargs)
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
    global _open
    _open = True
    _missing.clear()
    for name in MODULES:
        when_imported(name, _patch)


def uninstall() -> list[str]:
    """Put the original back."""
    global _open, _ours
    _open = False
    left = _patches.restore()
    for module in filter(None, map(sys.modules.get, MODULES)):
        held = vars(module).get("safe_open")
        if isinstance(held, _Opener):  # copied from safetensors while it was imported
            vars(module)["safe_open"] = held.original
    _ours = None
    return left


def status() -> dict[str, Any]:
    """Return what is watched, and who holds the original from before."""
    row: dict[str, Any] = {
        "watched": [f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced],
        "early_copies": [copy for copy in _patches.early_copies() if not copy.startswith("safetensors.")],
    }
    if _missing:
        row["problem"] = f"not in this safetensors: {', '.join(_missing)}"
    return row


def _patch(module: ModuleType) -> None:
    """Replace ``safe_open`` in one module of safetensors."""
    global _ours
    if not _open or any(patched is module for patched, _, _, _ in _patches.replaced):
        return
    original = vars(module).get("safe_open")
    if original is None:
        if module.__name__ == "safetensors":  # safetensors.torch may be in the middle of its import: it will copy ours
            _missing.append("safetensors.safe_open")
        return
    if isinstance(original, _Opener):
        return
    if _ours is None or _ours.original is not original:
        _ours = _Opener("safe_open", (), {"original": original, "__init_subclass__": classmethod(_refuse_subclass)})
    _patches.replace(module, "safe_open", _ours)


def _settled(owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``safe_open`` with a bare ``"cuda"`` settled."""
    positional = len(args) > _DEVICE_POSITION
    named = args[_DEVICE_POSITION] if positional else kwargs.get("device")
    tag = _tag(named)
    if tag is None or tag == owner.tag:
        return args, kwargs
    if named != "cuda" or owner.index < 0:
        _keep(tag, owner)
    elif judge(NAME, tag, owner, 0, _ADVICE_BARE, target=owner.tag):
        if positional:
            return (*args[:_DEVICE_POSITION], owner.tag, *args[_DEVICE_POSITION + 1 :]), kwargs
        return args, {**kwargs, "device": owner.tag}
    return args, kwargs


def _tag(named: Any) -> str | None:
    """Return the CUDA device that safetensors takes `named` for; None if it is none, or not valid."""
    if isinstance(named, str):
        return GPU_0 if named == "cuda" else named if named.startswith("cuda:") else None
    try:
        index = operator.index(named)
    except TypeError:
        return None
    return f"cuda:{index}" if index >= 0 else None


def _keep(tag: str, owner: Owner) -> None:
    """Record a device that the program asked for by name; refuse it in mode ``error``."""
    mode = in_force.mode_of(NAME)
    if mode == "off" or is_allowed(tag):
        return
    if mode == "error":
        raise refused(NAME, tag, owner.tag, 0, _ADVICE_EXPLICIT)
    journal.record(NAME, tag, tag, owner.tag, "kept", 0)
