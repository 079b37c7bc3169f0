"""The reader's half of a payload: the skeleton is unpickled, and its tensors and arrays are copied or used in place."""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from devguard.transport.layouts import SMALL, Layout, address_of, as_tensor

__all__ = [
    "align",
    "LARGE",
    "restore_storage",
    "restore_tensor",
    "restore_typed_storage",
    "restore_view",
    "unpack",
    "Way",
]

ALIGNMENT = 64
LARGE = 1 << 16  # bytes from which memory comes from the system: whole pages, which need no zeros first


def align(position: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-position // ALIGNMENT) * ALIGNMENT


# What stands in a skeleton for a part. `unpack` replaces these functions by its own.


def _misplaced(*_: Any) -> Any:
    raise pickle.UnpicklingError("This is the skeleton of a devguard handle: read it by handle.get() or handle.view().")


def restore_tensor(number: int) -> Any:
    """Stand for a tensor."""
    _misplaced(number)


def restore_storage(number: int) -> Any:
    """Stand for a storage."""
    _misplaced(number)


def restore_typed_storage(number: int, dtype: str) -> Any:
    """Stand for a storage with a dtype."""
    _misplaced(number, dtype)


def restore_view(part: int, kind: str, shape: tuple[int, ...], readonly: bool) -> Any:
    """Stand for a memoryview."""
    _misplaced(part, kind, shape, readonly)


class Way(NamedTuple):
    """How a reader wants the bytes.

    Attributes
    ----------
    copies : bool
        Whether it takes a copy of its own, else it uses the payload's memory, for tensors on the host.
    device_of : callable
        ``device_of(on_accelerator) -> device``: where a tensor is to lie, None for the host.
    """

    copies: bool
    device_of: Callable[[bool], Any]


class _Reader:
    """A file over a buffer."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._position + size
        data = bytes(self._view[self._position : end])
        self._position += len(data)
        return data

    def readinto(self, target: Any) -> int:
        into = memoryview(target).cast("B")
        data = self._view[self._position : self._position + len(into)]
        into[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readline(self) -> bytes:
        line = io.BytesIO(self._view[self._position :]).readline()
        self._position += len(line)
        return line


def unpack(source: Any, way: Way) -> Any:
    """Return the object of a payload.

    Parameters
    ----------
    source : buffer
        The payload's bytes; writable if the object is to use them in place.
    way : Way
        Whether to copy, and to which device.

    Returns
    -------
    object
        With tensors on the host, or on ``way.device``.
    """
    view = memoryview(source).cast("B")
    skeleton = int.from_bytes(view[:8], "little")
    head = int.from_bytes(view[8:16], "little")
    sizes, offsets, buffers, layouts = pickle.loads(view[16 : 16 + head])
    base = align(skeleton)
    parts = [view[base + offset : base + offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    beside = _Parts(parts, [Layout(*one) for one in layouts], way)
    return _Unpickler(view[16 + head : skeleton], beside, buffers).load()


class _Unpickler(pickle.Unpickler):
    """Unpickles the skeleton.

    It refers to the parts, and they not to it: a circle would keep a map until the garbage collector comes.
    """

    def __init__(self, body: memoryview, beside: _Parts, buffers: list[int]) -> None:
        super().__init__(_Reader(body), buffers=map(beside.restore_bytes, buffers))
        self._beside = beside

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name.startswith("restore_"):
            return getattr(self._beside, name)
        return super().find_class(module, name)


class _Parts:
    """Makes the tensors and arrays of a payload. Its methods stand for the functions that the skeleton names."""

    def __init__(self, parts: list[memoryview], layouts: list[Layout], way: Way) -> None:
        self._parts, self._layouts, self._way = parts, layouts, way
        self._memories: dict[tuple[int, bool], Any] = {}

    def restore_bytes(self, number: int) -> memoryview:
        """Return the bytes of a part."""
        part = self._parts[number]
        return _copy_of(part) if self._way.copies else part

    def restore_view(self, number: int, kind: str, shape: tuple[int, ...], readonly: bool) -> memoryview:
        """Return a view of memory."""
        view = self.restore_bytes(number)
        if kind != "B" or len(shape) != 1:
            form: Any = kind  # any native format that memoryview knows
            view = view.cast(form, shape) if all(shape) else memoryview(b"").cast(form)
        return view.toreadonly() if readonly else view

    def restore_tensor(self, number: int) -> Any:
        """Return a tensor."""
        import torch

        layout = self._layouts[number]
        dtype = getattr(torch, layout.dtype)
        memory = self._memory(layout.part, layout.on_accelerator)
        rest = memory.numel() % dtype.itemsize
        memory = (memory[:-rest] if rest else memory).view(dtype)
        tensor = memory.as_strided(layout.shape, layout.strides, layout.offset)
        if layout.is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=layout.requires_grad)
        return tensor.requires_grad_() if layout.requires_grad else tensor

    def restore_storage(self, number: int) -> Any:
        """Return a storage."""
        return self.restore_tensor(number).untyped_storage()

    def restore_typed_storage(self, number: int, dtype: str) -> Any:
        """Return a storage with a dtype."""
        import torch

        make: Any = torch.storage.TypedStorage
        return make(wrap_storage=self.restore_storage(number), dtype=getattr(torch, dtype), _internal=True)

    def _memory(self, part: int, on_accelerator: bool) -> Any:
        """Return a part as a tensor of bytes, on the device where its tensors belong."""
        import torch

        known = self._memories.get((part, on_accelerator))
        if known is not None:
            return known
        device, source = self._way.device_of(on_accelerator), self._parts[part]
        if device is None and not self._way.copies:
            memory = as_tensor(source) if source else torch.empty(0, dtype=torch.uint8, device="cpu")
        else:
            memory = torch.empty(len(source), dtype=torch.uint8, device=device or "cpu")
            if device is None and 0 < len(source) < SMALL:
                ctypes.memmove(memory.data_ptr(), address_of(source), len(source))
            elif source:
                memory.copy_(as_tensor(source))
        self._memories[part, on_accelerator] = memory
        return memory


def _copy_of(part: memoryview) -> memoryview:
    """Return a writable copy."""
    if len(part) < LARGE:
        return memoryview(bytearray(part))
    target = memoryview(mmap.mmap(-1, len(part)))
    ctypes.memmove(address_of(target), address_of(part), len(part))
    return target
