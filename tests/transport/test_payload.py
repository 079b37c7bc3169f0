"""Any object goes through a payload and comes out equal: tensors over dtype, shape, stride, layout and aliasing."""

from __future__ import annotations

import array
import ctypes
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devguard.transport import payload
from devguard.transport.unpack import Way, unpack
from tests.helpers.tensors import SPECIAL, describe, tensors

COPY, IN_PLACE = Way(True, lambda _: None), Way(False, lambda _: None)
# torch says so once in a process, of the kind of tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
WAYS = pytest.mark.parametrize("way", [COPY, IN_PLACE], ids=["copy", "in place"])


def through(value: Any, way: Way = COPY) -> Any:
    packed = payload.pack(value)
    memory = bytearray(packed.nbytes)
    packed.write(memory)
    return unpack(memory, way)


@dataclasses.dataclass
class Request:
    pixels: torch.Tensor
    sizes: list[tuple[int, int]]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert (one.dtype, one.shape, one.layout, type(one)) == (other.dtype, other.shape, other.layout, type(other))
    assert one.requires_grad == other.requires_grad
    if one.layout is not torch.strided:
        return torch.equal(one.to_dense(), other.to_dense())
    return bits(one) == bits(other)


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@settings(max_examples=150)
@given(tensor=tensors(), in_place=st.booleans())
def test_a_tensor_comes_out_equal(tensor: torch.Tensor, in_place: bool) -> None:
    tensor = tensor.detach()
    assert same(tensor, through(tensor, IN_PLACE if in_place else COPY))


@settings(max_examples=100)
@given(data=st.data(), in_place=st.booleans())
def test_tensors_that_overlap_share_memory_afterwards(data: Any, in_place: bool) -> None:
    base = torch.arange(24, dtype=torch.int16).view(4, 6)
    views = [
        base[data.draw(st.integers(0, 2)) :, data.draw(st.integers(0, 3)) :: data.draw(st.integers(1, 2))]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    whole, *parts = through([base, *views], IN_PLACE if in_place else COPY)
    for part, view in zip(parts, views, strict=True):
        assert part.stride() == view.stride()
        assert torch.equal(part, view)
        part.fill_(-1)
        view.fill_(-1)
        assert torch.equal(whole, base)


OBJECTS: dict[str, Callable[[], Any]] = {
    "nest": lambda: {"a": [torch.ones(2), (torch.zeros(3), None)], "b": {"c": 1.5}},
    "dataclass": lambda: Request(torch.rand(3, 4), [(1, 2)]),
    "video": lambda: [torch.randint(0, 255, (8, 16, 16, 3), dtype=torch.uint8) for _ in range(3)],
    "audio": lambda: (torch.rand(16000), torch.randint(-99, 99, (16000,), dtype=torch.int16)),
    "permuted image": lambda: torch.rand(16, 16, 3).permute(2, 0, 1),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "frozen parameter": lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "module": lambda: torch.nn.Linear(3, 2),
    "leaf with gradient": lambda: torch.ones(2, requires_grad=True),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negative view": lambda: torch.tensor([1 + 2j]).conj().imag,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "expanded": lambda: torch.ones(1, 3).expand(1000, 3),
    "narrow slice of a large tensor": lambda: torch.rand(100, 1000)[:, :2],
    "zero-size": lambda: torch.empty(0, 3, dtype=torch.bfloat16),
    "scalar": lambda: torch.tensor(7),
    "storage": lambda: torch.arange(3, dtype=torch.float32).untyped_storage(),
    "array": lambda: np.arange(100).reshape(4, 25),
    "strided array": lambda: np.arange(100)[::3],
    "array of Fortran order": lambda: np.asfortranarray(np.ones((3, 4))),
    "read-only array": lambda: np.frombuffer(b"abcdefgh", dtype=np.uint16),
    "array of objects": lambda: np.array([{"a": 1}, None], dtype=object),
    "bytes": lambda: b"abc" * 70_000,
    "bytearray": lambda: bytearray(b"abc") * 70_000,
    "view of memory": lambda: memoryview(array.array("d", [1.0, 2.0])),
    "read-only view": lambda: memoryview(b"abcdef"),
    "strided view": lambda: memoryview(b"abcdef")[::2],
    "empty view": lambda: memoryview(b""),
    "text": lambda: "ü" * 100_000,
}


def equal(one: Any, other: Any) -> bool:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        return same(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.flags.writeable) == (other.dtype, other.shape, other.flags.writeable)
        return bool((one == other).all())
    if isinstance(one, memoryview):
        return (one.format, one.shape, one.readonly, one.tobytes()) == (
            other.format,
            other.shape,
            other.readonly,
            other.tobytes(),
        )
    if isinstance(one, torch.UntypedStorage):
        return bytes(one.tolist()) == bytes(other.tolist())
    if isinstance(one, torch.nn.Module):
        return equal(dict(one.named_parameters()), dict(other.named_parameters()))
    if dataclasses.is_dataclass(one):
        return equal(vars(one), vars(other))
    return bool(one == other)


@WAYS
@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_an_object_comes_out_equal(make: Callable[[], Any], way: Way) -> None:
    value = make()
    assert equal(value, through(value, way))


@WAYS
@pytest.mark.parametrize("kind", sorted(SPECIAL))
def test_special_tensors_come_out_as_pickle_brings_them(kind: str, way: Way) -> None:
    tensor = SPECIAL[kind]("cpu")
    arrived = through([tensor], way)[0]
    again = pickle.loads(pickle.dumps(tensor))
    assert type(arrived) is type(tensor)
    if not tensor.is_nested and kind != "two_tensor":
        assert same(again, arrived)
    else:
        assert describe(again) == describe(arrived)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.uint16, torch.bool, torch.complex64])
def test_dtypes_that_pickle_handles_badly_come_out_equal(dtype: torch.dtype) -> None:
    tensor = torch.arange(8).to(torch.float32).to(dtype)
    assert same(tensor, through(tensor))


def test_subclasses_keep_their_class_and_attributes() -> None:
    class Picture(torch.Tensor):
        pass

    globals()["Picture"] = Picture
    Picture.__qualname__ = "Picture"
    picture = torch.rand(3).as_subclass(Picture)
    picture.title = "cat"  # type: ignore[attr-defined]
    arrived = through(picture)
    assert type(arrived) is Picture
    assert arrived.title == "cat"  # type: ignore[attr-defined]
    assert torch.equal(arrived.as_subclass(torch.Tensor), picture.as_subclass(torch.Tensor))


def test_a_slice_takes_the_room_of_a_slice() -> None:
    assert payload.pack(torch.rand(1000, 1000)[:, :2]).nbytes < 10_000
    assert payload.pack(torch.rand(1000, 1000)[:2]).nbytes < 10_000


def test_large_bytes_are_not_copied_before_they_are_written() -> None:
    large = b"x" * (1 << 20)
    packed = payload.pack([large, bytearray(1 << 20)])
    assert any(chunk is large for chunk in packed._chunks)


def test_copies_are_writable_and_of_their_own() -> None:
    tensor = torch.zeros(3)
    packed = payload.pack([tensor, np.zeros(3), bytearray(3)])
    memory = bytearray(packed.nbytes)
    packed.write(memory)
    first, second = unpack(memory, COPY), unpack(memory, COPY)
    first[0].fill_(1), first[1].fill(1)
    assert not second[0].any()
    assert not second[1].any()


@pytest.mark.parametrize("value", [lambda: None, (print for _ in ())])
def test_what_cannot_be_pickled_is_refused_by_pickle(value: Any) -> None:
    with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
        payload.pack(value)


def test_nothing_waits_for_the_garbage_collector() -> None:
    """A tensor's memory comes back with its last name, as do the payload and what was made of it in place."""
    gc.disable()
    try:
        tensor, array_of_its_own = torch.rand(1000), np.ones(1000)
        ends = [weakref.ref(tensor), weakref.ref(array_of_its_own)]
        # No sparse tensor: torch's own pickles keep those in a list until the next torch.load.
        packed = payload.pack([tensor, array_of_its_own, memoryview(bytearray(10)), bytes(100_000)])
        memory = (ctypes.c_ubyte * packed.nbytes)()
        packed.write(memory)
        ends.append(weakref.ref(memory))
        arrived = unpack(memory, IN_PLACE)
        copied = unpack(memory, COPY)
        ends.append(weakref.ref(arrived[0]))
        del tensor, array_of_its_own, packed, memory, arrived, copied
        assert [end() for end in ends] == [None] * len(ends)
    finally:
        gc.enable()
