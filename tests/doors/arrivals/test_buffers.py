"""The door ``buffers`` on a CPU build: where `torch.frombuffer` is left alone.

Copies to a GPU are tested on simulated GPUs (tests/placement).
"""

from __future__ import annotations

import array
import mmap
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError, StrayDeviceWarning
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def aliases(tensor: torch.Tensor, buffer: bytearray) -> bool:
    buffer[0] ^= 0xFF
    return bool(tensor[0] == buffer[0])


UNTOUCHED: dict[str, Any] = {
    "no scope": nullcontext,
    "remap to the cpu": lambda: devguard.remap("cpu"),
    "guard of the cpu": lambda: devguard.guard("cpu"),
    "guard of the cpu that names it": lambda: devguard.guard("cpu", doors={"buffers": "error"}),
    "unguarded": devguard.unguarded,
}


@pytest.mark.parametrize("scoped", UNTOUCHED)
def test_frombuffer_still_aliases(scoped: str) -> None:
    with devguard.guard("cpu"):
        pass  # the doors are open
    buffer = bytearray(range(16))
    scope: AbstractContextManager[Any] = UNTOUCHED[scoped]()
    with scope:
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    assert aliases(tensor, buffer)
    assert devguard.strays() == ()


def test_frombuffer_in_a_plain_guard_of_a_gpu_still_aliases(cuda: FakeCuda) -> None:
    buffer = bytearray(range(16))
    with devguard.guard("cuda:1", mode="error"):
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    assert aliases(tensor, buffer)
    assert devguard.strays() == ()


def test_frombuffer_in_unguarded_inside_remap_still_aliases(cuda: FakeCuda) -> None:
    buffer = bytearray(range(16))
    with devguard.remap("cuda:1"), devguard.unguarded():
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
    assert aliases(tensor, buffer)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.uint8},
        {"dtype": torch.float32, "count": 2},
        {"dtype": torch.float32, "offset": 4},
        {"dtype": torch.int16, "count": 3, "offset": 2},
        {"dtype": torch.float64, "requires_grad": True},
        {"dtype": torch.bool},
        {"dtype": torch.complex64, "count": 1},
    ],
    ids=repr,
)
def test_every_argument_passes_through(options: dict[str, Any]) -> None:
    buffer = bytearray(b"\x01\x00" * 8)
    expected = torch.frombuffer(buffer, **options)
    with devguard.remap("cpu"):
        tensor = torch.frombuffer(buffer, **options)
    assert torch.equal(tensor, expected)
    assert tensor.dtype == expected.dtype
    assert tensor.requires_grad == expected.requires_grad
    assert tensor.data_ptr() == expected.data_ptr()


@pytest.mark.parametrize(
    "buffer",
    [bytearray(8), memoryview(bytearray(8)), array.array("i", [1, 2]), torch.zeros(8, dtype=torch.uint8).numpy()],
    ids=lambda buffer: type(buffer).__name__,
)
def test_every_kind_of_buffer_passes_through(buffer: Any) -> None:
    with devguard.remap("cpu"):
        assert torch.frombuffer(buffer, dtype=torch.uint8).numel() == 8


def test_a_memory_map_passes_through() -> None:
    with mmap.mmap(-1, 16) as memory:
        with devguard.remap("cpu"):
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
        memory[0] = 7
        assert tensor[0] == 7
        del tensor


@pytest.mark.parametrize("options", [{}, {"dtype": torch.uint8, "offset": 99}, {"dtype": "uint8"}], ids=repr)
def test_torchs_own_errors_are_raised(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        torch.frombuffer(bytearray(8), **options)
    with devguard.remap("cpu"), pytest.raises(expected.type) as caught:
        torch.frombuffer(bytearray(8), **options)
    assert str(caught.value) == str(expected.value)


REQUESTS: dict[str, Any] = {
    "remap": lambda mode: devguard.remap("cuda:1", mode=mode),
    "guard that names it": lambda mode: devguard.guard("cuda:1", doors={"buffers": mode}),
}


@pytest.mark.parametrize("request_by", REQUESTS)
def test_observe_records_and_leaves_it_on_the_host(cuda: FakeCuda, request_by: str) -> None:
    buffer = bytearray(range(16))
    with REQUESTS[request_by]("observe"):
        tensor = torch.frombuffer(buffer, dtype=torch.float32, count=2, offset=4)
    assert tensor.data_ptr() == torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() + 4
    (stray,) = devguard.strays()
    found = stray.door, stray.source, stray.target, stray.owner, stray.action, stray.bytes, stray.dtype, stray.shape
    assert found == ("buffers", "cpu", "cpu", "cuda:1", "observed", 8, "torch.float32", (2,))
    assert stray.site is not None
    assert stray.site.file == __file__


@pytest.mark.parametrize("request_by", REQUESTS)
def test_warn_warns_and_leaves_it_on_the_host(cuda: FakeCuda, request_by: str) -> None:
    with REQUESTS[request_by]("warn"), pytest.warns(StrayDeviceWarning, match="buffers"):
        tensor = torch.frombuffer(bytearray(16), dtype=torch.uint8)
    assert tensor.device.type == "cpu"


@pytest.mark.parametrize("request_by", REQUESTS)
def test_error_refuses(cuda: FakeCuda, request_by: str) -> None:
    with REQUESTS[request_by]("error"), pytest.raises(StrayDeviceError, match=r"buffers.*16 bytes.*owns cuda:1"):
        torch.frombuffer(bytearray(16), dtype=torch.uint8)


@pytest.mark.parametrize("request_by", REQUESTS)
def test_off_leaves_it_alone(cuda: FakeCuda, request_by: str) -> None:
    with REQUESTS[request_by]("off"):
        assert torch.frombuffer(bytearray(16), dtype=torch.uint8).device.type == "cpu"
    assert devguard.strays() == ()


@pytest.mark.parametrize("request_by", REQUESTS)
def test_repair_copies_to_the_owner(cuda: FakeCuda, request_by: str) -> None:
    """A build without CUDA fails at once to make the copy, which shows that the tensor goes to the owner."""
    with REQUESTS[request_by]("repair"), pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.frombuffer(bytearray(16), dtype=torch.uint8)


def test_install_requests_the_door_by_name(cuda: FakeCuda) -> None:
    devguard.install("repair", "cuda:1")
    torch.frombuffer(bytearray(16), dtype=torch.uint8)
    assert devguard.strays() == ()
    devguard.install("repair", "cuda:1", doors={"buffers": "observe"})
    torch.frombuffer(bytearray(16), dtype=torch.uint8)
    assert [stray.action for stray in devguard.strays()] == ["observed"]
    with devguard.unguarded():
        torch.frombuffer(bytearray(16), dtype=torch.uint8)
    assert [stray.count for stray in devguard.strays()] == [1]


def test_a_guard_inside_remap_still_requests_the_door(cuda: FakeCuda) -> None:
    with devguard.remap("cuda:1", mode="observe"), devguard.guard("cuda:2"):
        torch.frombuffer(bytearray(16), dtype=torch.uint8)
    assert [stray.owner for stray in devguard.strays()] == ["cuda:2"]


def test_remap_decorates_too(cuda: FakeCuda) -> None:
    @devguard.remap("cuda:1", mode="observe")
    def parse(buffer: bytearray) -> torch.Tensor:
        return torch.frombuffer(buffer, dtype=torch.uint8)

    parse(bytearray(4))
    assert len(devguard.strays()) == 1


def test_a_load_inside_remap_is_repaired_as_in_a_guard() -> None:
    import pickle

    with devguard.remap("cpu"):
        assert pickle.loads(tagging.dumps(torch.ones(2))).tolist() == [1, 1]
    assert [stray.action for stray in devguard.strays()] == ["repaired"]


def test_a_copy_of_frombuffer_from_before_the_door_was_opened_is_not_patched(cuda: FakeCuda) -> None:
    devguard.uninstall()
    copied = torch.frombuffer
    with devguard.remap("cuda:1", mode="error"):
        assert copied(bytearray(4), dtype=torch.uint8).numel() == 4
        with pytest.raises(StrayDeviceError):
            torch.frombuffer(bytearray(4), dtype=torch.uint8)
