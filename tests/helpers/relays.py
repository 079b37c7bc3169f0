"""Tensors that a ``cpu`` owner receives and passes on, for tests on a CPU build of torch."""

from __future__ import annotations

import pickle
from typing import Any

import torch

import devguard
from tests.helpers import tagging

TAG = "cuda:3"


def received(value: Any = None) -> Any:
    """Return `value` as a ``cpu`` owner receives it from a sender with tensors on `TAG`."""
    with devguard.guard("cpu"):
        return pickle.loads(tagging.dumps(torch.arange(6.0) if value is None else value))


def sent_to(data: bytes) -> list[str]:
    """Return the devices to which a receiver without devguard restores the tensors in a pickle."""
    with tagging.landings() as landed, devguard.unguarded():
        pickle.loads(data)
    return landed


def module_with(tensor: torch.Tensor) -> torch.nn.Module:
    """Return a module with `tensor`, of six numbers, as its weight."""
    module = torch.nn.Linear(6, 1, bias=False)
    module.weight = torch.nn.Parameter(tensor.view(1, 6))
    return module


def typed(tensor: torch.Tensor) -> Any:
    """Return the typed storage of `tensor`."""
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
