"""Knowing whether a thread's current device was moved inside a scope.

A scope whose device was current already has nothing to give back, unless somebody moved the device meanwhile. Asking
the runtime at every exit would cost a tenth of a microsecond for nothing, so the functions that move a device for good
leave a mark on the thread instead. Where a torch has them not, or while the doors are closed, every exit gives back.

Functions that move a device for a while and put it back themselves (``torch.cuda.device``) need no mark.
"""

from __future__ import annotations

from typing import Any

from devguard import scope
from devguard.patching import Patches

__all__ = ["install", "uninstall"]

# What torch.cuda.set_device, torch.accelerator.set_device_index and torch.cuda.set_stream call in the end.
MOVERS = ("_cuda_setDevice", "_accelerator_setDeviceIndex", "_cuda_setStream")

_patches = Patches()


def install() -> None:
    """Mark the thread whenever one of `MOVERS` is called."""
    import torch

    present = [name for name in MOVERS if hasattr(torch._C, name)]
    for name in present:
        _patch(torch._C, name)
    scope.tracked = "_cuda_setDevice" in present


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    scope.tracked = False
    return _patches.restore()


def _patch(module: Any, name: str) -> None:
    original = _patches.find(module, name)
    local = scope.local

    def move(*args: Any, **kwargs: Any) -> Any:
        local.stack.moved = True
        return original(*args, **kwargs)

    _patches.replace(module, name, move)
