"""Property tests: a load with the tag of a GPU equals the same load without one, for generated tensors."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard.reporting.journal import journal
from tests.helpers import tagging, tensors

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

TAGS = st.sampled_from(["cuda:0", "cuda:3", "cuda:77", "cuda"])
FEW = settings(max_examples=40)

# torch 2.13 has few operators for these types, so they are made from bytes, and are read from zip files only.
RARE_DTYPES = [
    getattr(torch, name)
    for name in (
        "complex32",
        "uint16",
        "uint32",
        "uint64",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)
]


@st.composite
def rare_tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """Views, with any shape, strides and offset, of one storage of a rare type."""
    dtype = draw(st.sampled_from(RARE_DTYPES))
    base = torch.arange(48, dtype=torch.uint8).view(dtype)
    views = [base]
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 2), max_size=2))
        stride = [draw(st.integers(0, 2)) for _ in shape]
        views.append(base.as_strided(shape, stride, draw(st.integers(0, base.numel() - 5))))
    return views


class Module(torch.nn.Module):
    """Parameters and buffers, some of which share storage."""

    def __init__(self, values: list[torch.Tensor]) -> None:
        super().__init__()
        for number, value in enumerate(values):
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(f"p{number}", value)
            else:
                self.register_buffer(f"b{number}", value.detach())

    def contents(self) -> str:
        state = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        return tensors.describe(state)


def contents(value: Any) -> str:
    return value.contents() if isinstance(value, Module) else tensors.describe(value)


def plain_bytes(value: Any, tag: str, protocol: int) -> bytes:
    with tagging.tagged(tag):
        return pickle.dumps(value, protocol)


def saved_bytes(value: Any, tag: str, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    with tagging.tagged(tag):
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def check(read: Callable[[bytes], Any], untagged: bytes, marked: bytes, any_bytes: bool) -> Any:
    """Check the guarded load of `marked` against the unguarded one of `untagged`; return the guarded value."""
    journal.clear()
    expected = contents(read(untagged))
    with devguard.guard("cpu"):
        value = read(marked)
        assert contents(value) == expected
        assert devguard.strays() or not any_bytes
        assert {stray.action for stray in devguard.strays()} <= {"repaired"}
        assert contents(read(untagged)) == expected
    with devguard.guard("cpu", mode="error"):
        assert contents(read(untagged)) == expected
    if any_bytes:
        with pytest.raises(RuntimeError, match=tagging.REFUSAL):
            read(marked)
    return value


def made_of_tensors(value: Any) -> bool:
    return bool(value[0])


@FEW
@given(value=tensors.containers(), tag=TAGS, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL), python=st.booleans())
def test_pickle(value: Any, tag: str, protocol: int, python: bool) -> None:
    read = pickle._loads if python else pickle.loads
    check(read, plain_bytes(value, "cpu", protocol), plain_bytes(value, tag, protocol), made_of_tensors(value))


@FEW
@given(value=tensors.containers(tensors.ZIP_DTYPES), tag=TAGS, weights_only=st.booleans())
def test_torch_load_of_a_zip_buffer(value: Any, tag: str, weights_only: bool) -> None:
    def read(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), weights_only=weights_only)

    check(read, saved_bytes(value, "cpu", False), saved_bytes(value, tag, False), made_of_tensors(value))


@FEW
@given(value=tensors.containers(), tag=TAGS, weights_only=st.booleans())
def test_torch_load_of_a_legacy_buffer(value: Any, tag: str, weights_only: bool) -> None:
    def read(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), weights_only=weights_only)

    check(read, saved_bytes(value, "cpu", True), saved_bytes(value, tag, True), made_of_tensors(value))


@FEW
@given(value=tensors.containers(tensors.ZIP_DTYPES), tag=TAGS, weights_only=st.booleans(), mmap=st.booleans())
def test_torch_load_of_a_file_and_of_a_memory_map(value: Any, tag: str, weights_only: bool, mmap: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"

        def read(data: bytes) -> Any:
            path.unlink(missing_ok=True)  # a mapped file must not change
            path.write_bytes(data)
            return torch.load(path, weights_only=weights_only, mmap=mmap)

        check(read, saved_bytes(value, "cpu", False), saved_bytes(value, tag, False), made_of_tensors(value))


@FEW
@given(value=rare_tensors(), tag=TAGS, weights_only=st.booleans())
def test_torch_load_of_rare_types(value: list[torch.Tensor], tag: str, weights_only: bool) -> None:
    def read(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), weights_only=weights_only)

    check(read, saved_bytes(value, "cpu", False), saved_bytes(value, tag, False), True)


@FEW
@given(value=tensors.containers(), tag=TAGS, way=st.sampled_from(["pickle", "zip", "legacy"]))
def test_modules_and_their_state(value: Any, tag: str, way: str) -> None:
    module = Module(value[0])
    for thing in (module, module.state_dict()):
        if way == "pickle":
            untagged, marked = plain_bytes(thing, "cpu", 4), plain_bytes(thing, tag, 4)
            check(pickle.loads, untagged, marked, True)
        else:
            untagged, marked = (saved_bytes(thing, each, way == "legacy") for each in ("cpu", tag))
            check(lambda data: torch.load(io.BytesIO(data), weights_only=False), untagged, marked, True)


@FEW
@given(value=tensors.containers(), tag=TAGS, legacy=st.booleans(), index=st.integers(0, 3))
def test_aliases_inside_one_load_write_to_one_memory(value: Any, tag: str, legacy: bool, index: int) -> None:
    base = torch.zeros(4)
    pair = [base, base[index:], base.detach(), torch.nn.Parameter(base), *value[0]]
    with devguard.guard("cpu"):
        loaded = torch.load(io.BytesIO(saved_bytes(pair, tag, legacy)))
    loaded[0][index] = 7
    assert loaded[1][0] == loaded[2][index] == loaded[3][index] == 7


@FEW
@given(value=tensors.containers(), protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_the_bytes_that_pickle_writes_are_the_same_under_a_guard(value: Any, protocol: int) -> None:
    before = pickle.dumps(value, protocol)
    with devguard.guard("cpu"):
        assert pickle.dumps(value, protocol) == before


@FEW
@given(value=tensors.containers(), tag=st.sampled_from(["cuda:0", "cuda:3"]), protocol=st.integers(2, 5))
def test_a_relay_passes_on_the_tags_that_it_received(value: Any, tag: str, protocol: int) -> None:
    marked = plain_bytes(value, tag, protocol)
    with tagging.landings() as landed:
        direct = contents(pickle.loads(marked))
        straight = list(landed)
        with devguard.guard("cpu"):
            again = pickle.dumps(pickle.loads(marked), protocol)
        assert landed == straight
        landed.clear()
        assert contents(pickle.loads(again)) == direct
        assert landed == straight


@FEW
@given(
    data=st.binary(min_size=16, max_size=64),
    dtype=st.sampled_from(tensors.ZIP_DTYPES),
    count=st.integers(1, 2) | st.just(-1),
    items=st.integers(0, 1),
    requires_grad=st.booleans(),
)
def test_frombuffer_inside_remap_of_the_cpu_is_untouched_and_aliases(
    data: bytes, dtype: torch.dtype, count: int, items: int, requires_grad: bool
) -> None:
    buffer = bytearray(data[: len(data) // 16 * 16])
    if dtype is torch.bool:
        buffer = bytearray(byte & 1 for byte in buffer)
    offset = items * dtype.itemsize
    if offset == len(buffer) or max(count, 1) * dtype.itemsize > len(buffer) - offset:
        count, offset = -1, 0
    options = {
        "dtype": dtype,
        "count": count,
        "offset": offset,
        "requires_grad": requires_grad and (dtype.is_floating_point or dtype.is_complex),
    }
    expected = torch.frombuffer(buffer, **options)
    with devguard.remap("cpu"):
        tensor = torch.frombuffer(buffer, **options)
    assert tensors.describe(tensor) == tensors.describe(expected)
    assert tensor.data_ptr() == expected.data_ptr()
    buffer[offset] ^= 1
    assert tensors.describe(tensor) == tensors.describe(expected)
