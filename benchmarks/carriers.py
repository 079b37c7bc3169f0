"""Ways to bring a tensor from one process to its readers: an arena, and the ways that programs use today.

Each is a pair: the sender's half takes a tensor and returns what travels in the message, the reader's half turns that
into a tensor. All use the same `Channel`, a stream socket with one message for each exchange and reader.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from multiprocessing import shared_memory
from typing import Any

import numpy
import torch

from devguard import transport

BUDGET = 1 << 30  # bytes of the arena


class End(IntEnum):
    """What a reader does with the tensor."""

    OPENED = 0  # nothing
    VIEW = 1  # reads every byte, once, in place
    WARM = 2  # copies it into memory that it keeps
    NEW = 3  # makes a new tensor of it


class Channel:
    """One end of a stream socket. A message has a length before it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Any) -> None:
        view = memoryview(message).cast("B")
        self._socket.sendall(len(view).to_bytes(8, "little"))
        self.send_bytes(view)

    def send_bytes(self, view: memoryview) -> None:
        self._socket.sendall(view)

    def receive(self) -> memoryview:
        size = bytearray(8)
        self.receive_into(memoryview(size))
        message = memoryview(numpy.empty(int.from_bytes(size, "little"), numpy.uint8))  # bytearray would zero it
        self.receive_into(message)
        return message

    def receive_into(self, target: memoryview) -> None:
        """Fill `target`; raises EOFError at the end."""
        while target:
            count = self._socket.recv_into(target, 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError
            target = target[count:]


def _bytes_of(tensor: Any) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")


class Sender:
    """The sender's half."""

    def send(self, head: bytes, tensor: Any, channels: Sequence[Channel]) -> None:
        """Send a tensor to the reader at the other end of each channel. Its message begins with `head`."""
        message = head + self.pack(tensor, len(channels))
        for channel in channels:
            channel.send(message)

    def pack(self, tensor: Any, readers: int) -> bytes:
        """Return what travels in the message."""
        raise NotImplementedError

    def end(self) -> None:
        """End an exchange, after the last reply."""

    def close(self) -> None:
        """Give all memory back."""


class Reader:
    """The reader's half."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        """Return a scope with the tensor. `kept()` is memory of its size that has been used before."""
        raise NotImplementedError


class ArenaSender(Sender):
    """devguard's arena."""

    def __init__(self) -> None:
        self._arena = transport.Arena("cpu", budget=BUDGET)

    def pack(self, tensor: Any, readers: int) -> bytes:
        return pickle.dumps(self._arena.put(tensor, to=readers))

    def close(self) -> None:
        self._arena.close()


class ArenaReader(Reader):
    """Uses the handle's `view`; `get` where a new tensor is wanted."""

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        handle = pickle.loads(message)
        return contextlib.nullcontext(handle.get()) if end is End.NEW else _ended(handle.view(), kept, end)


class FreshSegment:
    """A named segment for one tensor, as SGLang 0.5.23 sends images by default (``ShmPointerMMData``).

    Not taken over: the barrier of all ranks that comes before the name is removed, which would make it slower. Here the
    sender removes the name after the last reply, which takes as long as in the reader.
    """

    def __init__(self, tensor: Any) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        segment = shared_memory.SharedMemory(create=True, size=tensor.nbytes)
        os.posix_fallocate(segment._fd, 0, tensor.nbytes)  # type: ignore[attr-defined]
        torch.frombuffer(segment.buf, dtype=torch.uint8).copy_(tensor.view(torch.uint8).reshape(-1))
        self.name = segment.name
        segment.close()

    def materialize(self) -> Any:
        """Return a tensor over a map of its own, in which writes stay local."""
        segment = shared_memory.SharedMemory(name=self.name)
        try:
            size = self.shape.numel() * self.dtype.itemsize
            owned = mmap.mmap(segment._fd, size, access=mmap.ACCESS_COPY)  # type: ignore[attr-defined]
            return torch.frombuffer(owned, dtype=self.dtype).reshape(self.shape)
        finally:
            segment.close()

    def unlink(self) -> None:
        segment = shared_memory.SharedMemory(name=self.name)
        segment.unlink()
        segment.close()


class FreshSegmentSender(Sender):
    """A new segment for each tensor."""

    _sent: FreshSegment

    def pack(self, tensor: Any, readers: int) -> bytes:
        self._sent = FreshSegment(tensor)
        return pickle.dumps(self._sent)

    def end(self) -> None:
        self._sent.unlink()


class FreshSegmentReader(Reader):
    """Maps the segment, and copies it where the tensor is to be kept."""

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        return _ended(contextlib.nullcontext(pickle.loads(message).materialize()), kept, end)


class PickleSender(Sender):
    """Everything in one pickle, in the message."""

    def pack(self, tensor: Any, readers: int) -> bytes:
        return pickle.dumps(tensor, protocol=5)

    def send(self, head: bytes, tensor: Any, channels: Sequence[Channel]) -> None:
        message = self.pack(tensor, len(channels))
        for channel in channels:
            channel.send(head)
            channel.send(message)


class PickleReader(Reader):
    """Unpickles, which makes a new tensor."""

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        value = contextlib.nullcontext(pickle.loads(self.channel.receive()))
        return value if end is End.NEW else _ended(value, kept, end)


class OutOfBandSender(Sender):
    """Pickle 5: the tensor's bytes follow the pickle, without a copy by the sender."""

    def send(self, head: bytes, tensor: Any, channels: Sequence[Channel]) -> None:
        buffers: list[pickle.PickleBuffer] = []
        skeleton = pickle.dumps(tensor.numpy(), protocol=5, buffer_callback=buffers.append)
        for channel in channels:
            channel.send(head + skeleton)
            channel.send_bytes(buffers[0].raw())


class OutOfBandReader(Reader):
    """Receives the bytes where they are wanted: in memory that is used again, or in a new tensor."""

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        target = torch.empty_like(kept()) if end is End.NEW else kept()
        self.channel.receive_into(_bytes_of(target))
        value = torch.from_numpy(pickle.loads(message, buffers=[_bytes_of(target)]))
        return contextlib.nullcontext(value)


class ReusedSegmentSender(Sender):
    """One named segment for all tensors of a size; the sender waits for the replies before it writes again."""

    def __init__(self) -> None:
        self._segments: dict[int, tuple[shared_memory.SharedMemory, Any]] = {}

    def pack(self, tensor: Any, readers: int) -> bytes:
        if tensor.nbytes not in self._segments:
            segment = shared_memory.SharedMemory(create=True, size=tensor.nbytes)
            self._segments[tensor.nbytes] = segment, torch.frombuffer(segment.buf, dtype=torch.uint8)
        segment, target = self._segments[tensor.nbytes]
        target.copy_(tensor.view(torch.uint8).reshape(-1))
        return pickle.dumps((segment.name, tensor.shape, tensor.dtype))

    def close(self) -> None:
        while self._segments:
            _, (segment, target) = self._segments.popitem()
            del target  # a segment does not close before its last buffer
            segment.unlink()
            segment.close()


class ReusedSegmentReader(Reader):
    """Maps the segment once."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._segments: dict[str, tuple[shared_memory.SharedMemory, Any]] = {}

    def open(self, message: memoryview, kept: Callable[[], Any], end: End) -> contextlib.AbstractContextManager[Any]:
        name, shape, dtype = pickle.loads(message)
        if name not in self._segments:
            segment = shared_memory.SharedMemory(name=name)
            self._segments[name] = segment, torch.frombuffer(segment.buf, dtype=torch.uint8)
        memory = self._segments[name][1][: shape.numel() * dtype.itemsize]
        return _ended(contextlib.nullcontext(memory.view(dtype).reshape(shape)), kept, end)


@contextlib.contextmanager
def _ended(scope: contextlib.AbstractContextManager[Any], kept: Callable[[], Any], end: End) -> Iterator[Any]:
    """Bring a tensor that is used in place to the end state that is wanted."""
    with scope as tensor:
        if end is End.WARM:
            yield kept().copy_(tensor)
        else:
            yield tensor.clone() if end is End.NEW else tensor


CARRIERS: dict[str, tuple[type[Sender], type[Reader]]] = {
    "an arena": (ArenaSender, ArenaReader),
    "a fresh segment": (FreshSegmentSender, FreshSegmentReader),
    "pickle in band": (PickleSender, PickleReader),
    "pickle 5 into a reused buffer": (OutOfBandSender, OutOfBandReader),
    "a reused segment": (ReusedSegmentSender, ReusedSegmentReader),
}
