"""Which tensors are described by their layout, and which travel as pickle knows them."""

from __future__ import annotations

import pytest
import torch

from devguard.transport.layouts import Tensors, as_tensor, is_plain


def attributed() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.title = "cat"  # type: ignore[attr-defined]
    return tensor


NOT_PLAIN = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "with attributes": attributed,
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_tensors_are_left_to_pickle(make: object) -> None:
    assert callable(make)
    assert not is_plain(make())
    assert is_plain(torch.ones(2))


def test_tensors_far_apart_in_one_memory_travel_alone() -> None:
    base = torch.arange(10_000.0)
    tensors, parts = Tensors(), []  # type: ignore[var-annotated]
    for tensor in (base[:4], base[-4:]):
        tensors.add(tensor)
    layouts = tensors.lay_out(parts)
    assert sum(part.nbytes for part in parts) == 32
    assert [layout.part for layout in layouts] == [0, 1]


def test_bytes_become_a_tensor_over_the_same_memory() -> None:
    memory = bytearray(4)
    as_tensor(memory)[1] = 7
    assert memory[1] == 7


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert as_tensor(bytearray(4)).device.type == "cpu"
