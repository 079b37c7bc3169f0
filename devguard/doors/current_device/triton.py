"""The door ``triton``: Triton launches a kernel on the current device, wherever its arguments lie.

With tensors on another device the launch fails at best; at worst it reads memory over the bus from a context that
nobody wanted. Inside a guard the devices of the arguments are looked at before each launch:

- all on the owner, another device current: launched under the owner (mode ``repair``);
- all on a device that is not the owner's: recorded, refused in mode ``error``; mode ``repair`` launches it where its
  arguments are, which is the only place where it can work;
- on several devices: recorded, refused in mode ``error``; there is no right place.

``triton.runtime.jit.JITFunction.run`` is where every launch arrives, through heuristics and decorators of other
libraries too; ``triton.runtime.autotuner.Autotuner.run`` is watched as well, because tuning allocates and times on the
current device. Looked at are tensors, what Triton wraps around them, and tuples of them.

Not seen: kernels that ``torch.compile`` launches (it sets the device itself), kernels called through the object that
``warmup`` or a launch returned, and Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "triton"

# module of Triton -> its class whose `run` is watched
CLASSES = {"triton.runtime.jit": "JITFunction", "triton.runtime.autotuner": "Autotuner"}
_PLAIN = frozenset({int, float, bool, str, type(None)})

_patches = Patches()
_open = False
_missing: list[str] = []
_moves: accelerator.Exchange | None = None
_ADVICE_CURRENT = (
    "Triton launches on the current device, and the arguments are on the owner. Launch inside "
    "torch.cuda.device_of(tensor), or let devguard do it (mode='repair')."
)
_ADVICE_FOREIGN = "The arguments are there. Move them to the owner, or, if it is meant, launch in devguard.unguarded()."
_ADVICE_SEVERAL = "The arguments are on several devices. Move them to one, or launch in devguard.unguarded()."


class _Thread(threading.local):
    busy = False  # inside a launch that has been judged: an autotuner makes more of them


_thread = _Thread()


def install() -> None:
    """Watch Triton's launches, now or when Triton is imported; a build of torch without CUDA has none."""
    global _open, _moves
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    _moves = accelerator.bind()
    _open = True
    _missing.clear()
    for name in CLASSES:
        when_imported(name, _patch)


def uninstall() -> list[str]:
    """Put Triton's own methods back."""
    global _open
    _open = False
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which classes of Triton are watched; none before Triton is imported."""
    row: dict[str, Any] = {"watched": [kind.__qualname__ for kind, _, _, _ in _patches.replaced]}
    if _missing:
        row["problem"] = f"not in this Triton: {', '.join(_missing)}"
    return row


def _patch(module: ModuleType) -> None:
    """Watch the launches of one class of Triton."""
    if not _open:
        return
    kind = vars(module).get(CLASSES[module.__name__])
    if kind is None or "run" not in vars(kind):
        _missing.append(f"{module.__name__}.{CLASSES[module.__name__]}.run")
    elif not any(patched is kind for patched, _, _, _ in _patches.replaced):
        _patches.replace(kind, "run", _watched(_patches.find(kind, "run")))


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    current_device = torch._C._cuda_getDevice

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        owner = stack[-1][1] if stack else process.owner
        if owner is None:
            return original(self, *args, **kwargs)
        found: set[int] = set()
        _collect(args, found)
        _collect(kwargs.values(), found)
        if not found or (len(found) == 1 and owner.index in found and current_device() == owner.index):
            return original(self, *args, **kwargs)
        if _thread.busy:
            return original(self, *args, **kwargs)
        assert _moves is not None
        previous = _moves.to(_place(found))  # torch leaves everything alone for -1
        _thread.busy = True
        try:
            return original(self, *args, **kwargs)
        finally:
            _thread.busy = False
            _moves.back(previous)

    return run


def _collect(values: Iterable[Any], found: set[int]) -> None:
    """Add the indices of the CUDA devices on which `values` lie to `found`."""
    for value in values:
        if value.__class__ in _PLAIN:
            continue
        if isinstance(value, tuple):
            _collect(value, found)
            continue
        on_cuda = getattr(value, "is_cuda", None)
        if on_cuda is None:  # a TensorWrapper or a TensorDescriptor has a base, a constexpr none
            value = getattr(value, "base", None)
            on_cuda = getattr(value, "is_cuda", False)
        if on_cuda:
            found.add(value.get_device())


def _place(found: set[int]) -> int:
    """Let the verdict fall on a launch with arguments on `found`; the device to launch on, -1 to leave it.

    With the owner as the current device and as that of the arguments it is not called.
    """
    import torch

    owner = in_force.owner_at_door()  # which may put the current device right, if a library had changed it
    if owner is None:
        return -1
    current = torch._C._cuda_getDevice()
    away = ",".join(f"cuda:{index}" for index in sorted(found) if index != owner.index)
    if len(found) > 1:
        judge(NAME, away, owner, 0, _ADVICE_SEVERAL, note=f"arguments on {len(found)} devices, cuda:{current} current")
        return -1
    (index,) = found
    if away:
        judge(NAME, away, owner, 0, _ADVICE_FOREIGN, note=f"its arguments are there, cuda:{current} was current")
        return index if index != current and in_force.mode_of(NAME) == "repair" else -1
    if current != index and judge(NAME, f"cuda:{current}", owner, 0, _ADVICE_CURRENT, target=owner.tag):
        return index
    return -1
