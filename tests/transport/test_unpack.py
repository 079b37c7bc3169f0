"""The reader's half of a payload: where tensors go, and skeletons that are read by other means."""

from __future__ import annotations

import pickle

import pytest
import torch

from devguard.transport import payload
from devguard.transport.unpack import Way, restore_tensor, unpack


def test_the_device_is_asked_for_once_for_each_memory() -> None:
    base = torch.arange(4.0)
    packed = payload.pack([base, base[1:], torch.ones(2)])
    memory = bytearray(packed.nbytes)
    packed.write(memory)
    asked = []

    def device_of(on_accelerator: bool) -> str:
        asked.append(on_accelerator)
        return "meta"

    arrived = unpack(memory, Way(True, device_of))
    assert [tensor.device.type for tensor in arrived] == ["meta"] * 3
    assert asked == [False, False]


def test_a_skeleton_says_how_it_is_to_be_read() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"handle\.get\(\)"):
        restore_tensor(0)
