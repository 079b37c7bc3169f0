"""The door ``buffers`` on simulated GPUs: ``torch.frombuffer`` inside and outside ``remap()``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard import guard, remap
from tests.helpers import tensors


@settings(max_examples=80)
@given(st.sampled_from(tensors.ZIP_DTYPES), st.integers(1, 6), st.integers(0, 3), st.data())
def test_inside_remap_frombuffer_returns_a_copy_on_the_owner_with_equal_values(dtype, numel, skip, data):
    size = torch.empty(0, dtype=dtype).element_size()
    buffer = bytearray(data.draw(st.binary(min_size=(numel + skip) * size, max_size=(numel + skip) * size)))
    if dtype is torch.bool:
        buffer = bytearray(byte & 1 for byte in buffer)
    count = data.draw(st.sampled_from([-1, numel]))
    gradient = data.draw(st.booleans()) and dtype.is_floating_point
    options = {"dtype": dtype, "count": count, "offset": skip * size, "requires_grad": gradient}
    expected = torch.frombuffer(buffer, **options)
    with remap("cuda:1"):
        got = torch.frombuffer(buffer, **options)
    assert got.device == torch.device("cuda:1")
    assert (got.dtype, got.shape, got.requires_grad, got.is_leaf) == (dtype, expected.shape, gradient, True)
    assert got.detach().cpu().view(torch.uint8).tolist() == expected.detach().view(torch.uint8).tolist()
    before = got.detach().cpu().view(torch.uint8).tolist()
    buffer[:] = bytes(len(buffer))
    assert got.detach().cpu().view(torch.uint8).tolist() == before  # the copy does not follow the buffer
    assert not any(expected.detach().view(torch.uint8).tolist())  # the original does


def test_outside_remap_frombuffer_aliases_the_buffer_on_the_host():
    buffer = bytearray(8)
    with guard(1):
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    buffer[0] = 7
    assert tensor.device.type == "cpu"
    assert tensor[0] == 7
    assert devguard.strays() == ()


def test_a_door_named_in_doors_acts_without_remap():
    with guard(2, doors={"buffers": "repair"}):
        assert torch.frombuffer(bytearray(8), dtype=torch.float32).device.index == 2
    (stray,) = devguard.strays()
    assert (stray.door, stray.source, stray.target, stray.bytes) == ("buffers", "cpu", "cuda:2", 8)
    assert (stray.dtype, stray.shape) == ("torch.float32", (2,))


def test_remap_inherits_owner_and_mode_from_the_enclosing_scope():
    with guard(2, mode="error"), remap(), pytest.raises(devguard.StrayDeviceError, match="8 bytes"):
        torch.frombuffer(bytearray(8), dtype=torch.float32)
    with guard(2, mode="observe"), remap():
        assert torch.frombuffer(bytearray(8), dtype=torch.float32).device.type == "cpu"
    with remap(1), guard(3):
        assert torch.frombuffer(bytearray(8), dtype=torch.float32).device.index == 3
    with remap(1), devguard.unguarded():
        assert torch.frombuffer(bytearray(8), dtype=torch.float32).device.type == "cpu"


def test_remap_works_as_a_decorator():
    @remap(argument="gpu_id")
    def receive(data, gpu_id):
        return torch.frombuffer(data, dtype=torch.uint8)

    assert receive(bytearray(3), 1).device.index == 1


def test_the_cpu_owner_keeps_the_alias():
    buffer = bytearray(2)
    with remap("cpu"):
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    buffer[1] = 9
    assert tensor.tolist() == [0, 9]


def test_bad_arguments_raise_torchs_own_error():
    with remap(1), pytest.raises(ValueError, match="offset"):
        torch.frombuffer(bytearray(2), dtype=torch.uint8, offset=5)


def test_a_closed_door_changes_nothing():
    with remap(1):
        devguard.uninstall()
        assert torch.frombuffer(bytearray(2), dtype=torch.uint8).device.type == "cpu"
