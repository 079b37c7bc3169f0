"""A stand-in for SGLang's ``monkey_patch_torch_reductions``: the same names, attributes and wire format.

SGLang, and projects that copied its patch, write the UUID of the sender's GPU where torch writes its index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import reductions

_DEVICE = 6  # the position of the argument storage_device


def monkey_patch_torch_reductions() -> None:
    if hasattr(reductions, "_reduce_tensor_original"):
        return
    reductions._reduce_tensor_original = reductions.reduce_tensor
    reductions._rebuild_cuda_tensor_original = reductions.rebuild_cuda_tensor
    reductions.reduce_tensor = _reduce_tensor_modified
    reductions.rebuild_cuda_tensor = _rebuild_cuda_tensor_modified
    reductions.init_reductions()


def restore_torch_reductions() -> None:
    """Undo the patch. SGLang has no such function; the tests need one."""
    reductions.reduce_tensor = reductions._reduce_tensor_original
    reductions.rebuild_cuda_tensor = reductions._rebuild_cuda_tensor_original
    del reductions._reduce_tensor_original, reductions._rebuild_cuda_tensor_original
    reductions.init_reductions()


def _reduce_tensor_modified(*args: Any, **kwargs: Any) -> Any:
    function, sent = reductions._reduce_tensor_original(*args, **kwargs)
    return function, _modify(sent, _DEVICE, _device_to_uuid)


def _rebuild_cuda_tensor_modified(*args: Any) -> Any:
    return reductions._rebuild_cuda_tensor_original(*_modify(args, _DEVICE, _device_from_maybe_uuid))


def _device_to_uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_from_maybe_uuid(device: int | str) -> int:
    if isinstance(device, int):
        return device
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == device:
            return index
    raise ValueError(f"Invalid device_uuid={device}")


def _modify(values: tuple[Any, ...], at: int, modifier: Callable[[Any], Any]) -> tuple[Any, ...]:
    return (*values[:at], modifier(values[at]), *values[at + 1 :])
