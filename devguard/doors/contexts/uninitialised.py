"""Functions of torch that use CUDA without torch's own initialisation; for the door ``first_touch``.

They go to C++ directly, which opens the current device, GPU 0 in a new process, before Python has seen a first touch.
Here they initialise torch first: a ``cpu`` owner is judged, and the owner that the environment names is made current.

Out of reach: factory functions with ``pin_memory=True`` (a wrapper would slow down every call of them, and break
``torch.jit`` and ``torch.compile``, which know them by identity), ``torch.Stream`` and ``torch.Event`` (C types),
``torch.ops.aten``, and copies taken earlier, as ``from torch._C import ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership.stack import local
from devguard.support import accelerator
from devguard.support.patching import Patches

__all__ = ["patch"]

# Not every torch has all of them. Inductor and Triton import _cuda_getCurrentRawStream by name.
_FUNCTIONS = (
    "_accelerator_getStream",
    "_accelerator_synchronizeDevice",
    "_cuda_getCurrentBlasHandle",
    "_cuda_getCurrentStream",
    "_cuda_getDefaultStream",
    "_cuda_sleep",
    "_cuda_synchronize",
)


def patch(patches: Patches) -> None:
    """Patch the functions in torch, in this build with CUDA."""
    import torch

    for name in _FUNCTIONS:
        if hasattr(torch._C, name):
            patches.replace(torch._C, name, _wrap(patches.find(torch._C, name)))
    patches.replace(torch.Tensor, "pin_memory", _wrap(torch.Tensor.pin_memory), inherited=True)
    for kind, name in ((torch.cuda.CUDAGraph, "__new__"), (torch.cuda.Event, "ipc_handle")):
        if name in vars(kind):
            original = patches.find(kind, name)
            patches.replace(kind, name, _wrap(getattr(original, "__func__", original)))


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    _, is_initialized = accelerator.queries()

    def first_initialised(*args: Any, **kwargs: Any) -> Any:
        if not is_initialized():
            _initialise()
        return original(*args, **kwargs)

    return first_initialised


def _initialise() -> None:
    """Initialise torch's CUDA, unless this process cannot use a GPU: then the function itself raises its own error."""
    stack = local.stack
    if stack and stack[-1][1] is None:
        return  # unguarded
    if accelerator.device_count() and not accelerator.is_in_bad_fork():
        sys.modules["torch"].cuda.init()
