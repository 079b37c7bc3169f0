"""Bytes are copied in different ways by size: each arrives, and nothing beside it is touched."""

from __future__ import annotations

import pytest
import torch

from devguard.transport import payload
from devguard.transport.layouts import SMALL
from devguard.transport.unpack import Way, unpack


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("nbytes", [0, 1, 1000, SMALL - 1, SMALL, SMALL + 1])
@pytest.mark.parametrize("start", [0, 3, 16])
def test_bytes_of_each_size_arrive(nbytes, start, copies):
    whole = torch.randint(1, 255, (start + nbytes + 16,), dtype=torch.uint8)
    sent = [whole[start : start + nbytes], torch.full((5,), 255, dtype=torch.uint8)]
    packed = payload.pack(sent)
    memory = bytearray(packed.nbytes + 64)
    packed.write(memoryview(memory)[: packed.nbytes])
    assert memory[packed.nbytes :] == bytes(64)
    arrived = unpack(memory, Way(copies, lambda _: None))
    for one, other in zip(sent, arrived, strict=True):
        assert torch.equal(one, other)
