"""A payload: any picklable object, as a skeleton and the bytes of its tensors and arrays.

The skeleton is a pickle in which tensors, storages, arrays and views of memory stand as numbers. Their bytes lie beside
it, each part at a multiple of 64 bytes, and are copied once on each side. Tensors that share memory share it afterward.
No device travels: a tensor says only whether it was on an accelerator.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from typing import Any

from devguard.transport.layouts import Layout, Part, Tensors, address_of, bytes_of, is_plain
from devguard.transport.unpack import (
    LARGE,
    align,
    restore_storage,
    restore_tensor,
    restore_typed_storage,
    restore_view,
)

__all__ = ["pack", "Packed"]


class Packed:
    """An object, ready to be written somewhere.

    Attributes
    ----------
    nbytes : int
        The size of the payload.
    devices : list of torch.device
        The accelerators on which it has tensors.
    """

    def __init__(
        self, body: list[Any], layouts: list[Layout], parts: list[Part], buffers: list[int], devices: list[Any]
    ) -> None:
        offsets, position = [], 0
        for part in parts:
            position = align(position)
            offsets.append(position)
            position += part.nbytes
        sizes = [part.nbytes for part in parts]
        head = pickle.dumps((sizes, offsets, buffers, [tuple(one) for one in layouts]), protocol=5)
        self._chunks = [len(head).to_bytes(8, "little"), head, *body]
        self._parts, self._offsets = parts, offsets
        self.devices = devices
        self._skeleton = sum(len(chunk) for chunk in self._chunks) + 8
        self.nbytes = align(self._skeleton) + position

    def to_bytes(self) -> bytes:
        """Return the payload."""
        data = bytearray(self.nbytes)
        self.write(data)
        return bytes(data)

    def write(self, target: Any) -> None:
        """Write the payload into a writable buffer of at least `nbytes` bytes."""
        view = memoryview(target).cast("B")
        position = 8
        view[:8] = self._skeleton.to_bytes(8, "little")
        for chunk in self._chunks:
            view[position : position + len(chunk)] = chunk
            position += len(chunk)
        base = align(self._skeleton)
        for part, offset in zip(self._parts, self._offsets, strict=True):
            part.write(view[base + offset : base + offset + part.nbytes])


def pack(value: Any) -> Packed:
    """Return the payload of an object; its tensors and arrays are read when the payload is written.

    Raises
    ------
    pickle.PicklingError, TypeError
        The object cannot be pickled.
    """
    writer, beside = _Writer(), _Parts()
    _Pickler(writer, beside).dump(value)
    layouts = beside.tensors.lay_out(beside.parts)
    return Packed(writer.chunks, layouts, beside.parts, beside.buffers, list(beside.tensors.accelerators))


class _Writer:
    """A file that keeps what is written: pickle hands large bytes over as they are, without a copy."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []

    def write(self, data: Any) -> int:
        self.chunks.append(data)
        return len(data)


class _Parts:
    """What lies beside the skeleton."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.buffers: list[int] = []  # the parts that the pickle takes out of band, in its order
        self.tensors = Tensors()

    def add_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Take the bytes of an array; return False, which keeps them out of the pickle."""
        self.buffers.append(self.add_bytes(buffer.raw()))
        return False

    def add_bytes(self, raw: memoryview) -> int:
        """Take bytes; return the number of their part."""
        self.parts.append(Part(raw.nbytes, lambda target: _copy(target, raw)))
        return len(self.parts) - 1


class _Pickler(pickle.Pickler):
    """Pickles the skeleton.

    It refers to the parts, and they not to it: a circle would keep tensors until the garbage collector comes.
    """

    def __init__(self, writer: _Writer, beside: _Parts) -> None:
        super().__init__(writer, protocol=5, buffer_callback=beside.add_buffer)
        self._beside = beside

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, memoryview):
            raw = value.cast("B") if value.c_contiguous else memoryview(value.tobytes())
            return restore_view, (self._beside.add_bytes(raw), value.format, value.shape, value.readonly)
        torch = sys.modules.get("torch")
        if torch is None:
            return NotImplemented
        if type(value) is torch.Tensor or type(value) is torch.nn.Parameter:
            if is_plain(value):
                return restore_tensor, (self._beside.tensors.add(value),)
        elif isinstance(value, torch.UntypedStorage):
            if value.device.type in ("cpu", "cuda"):
                return restore_storage, (self._beside.tensors.add(bytes_of(value)),)
        elif isinstance(value, torch.storage.TypedStorage) and value._untyped_storage.device.type in ("cpu", "cuda"):
            return restore_typed_storage, (
                self._beside.tensors.add(bytes_of(value._untyped_storage)),
                str(value.dtype)[6:],
            )
        return NotImplemented


def _copy(target: Any, raw: memoryview) -> None:
    """Copy bytes, without the GIL where the source's address can be had."""
    if raw.readonly or raw.nbytes < LARGE:
        target[:] = raw
        return
    ctypes.memmove(address_of(target), address_of(raw), raw.nbytes)
