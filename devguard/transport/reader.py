"""One reader of an arena: its connection, the segments that it has mapped, and the leases that it reads.

Reading needs no word from the arena: its segments arrive when they are made, and a word in shared memory says whether a
lease may be opened.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from devguard.errors import HandleReleased, PeerGone
from devguard.support import forks
from devguard.transport.leases import Readers
from devguard.transport.memory import Mapping, Memory
from devguard.transport.wire import CANCELLED, VERSION, Channel, Kind, Message, connect

__all__ = ["Host", "Named", "Reader"]

WELCOME_S = 30.0  # seconds until an arena must have answered
LOOK_S = 0.05  # seconds between looks whether a lease still lives, while its segment is on its way
SWEEP = 4096  # finished leases that are remembered before those that have ended are forgotten


class Named(Protocol):
    """What a handle says of its lease."""

    number: int
    readers: Readers
    slot: int
    segment: int

    @property
    def data(self) -> bytes | None:
        """The payload, if it travels in the handle."""


class Host(Protocol):
    """The thread that listens for the readers of this process."""

    def flush_later(self, reader: Reader) -> None:
        """Send what the reader's socket did not take, as soon as there is room."""

    def forget(self, reader: Reader, why: str = "") -> None:
        """End the reader."""


class Reader:
    """One reader of an arena: a connection, and what this process has read over it. Made by `join`.

    Attributes
    ----------
    address : str
        The arena.
    name : str or None
        The name by which puts address this reader.
    """

    def __init__(self, address: str, name: str | None, host: Host) -> None:
        self.address, self.name = address, name
        self._host = host
        self._changed = forks.new_condition()
        self._segments: dict[int, tuple[Memory, Mapping]] = {}
        self._index: Mapping | None = None
        self._words: Any = None
        self._inside: dict[int, object] = {}  # lease -> what is reading it
        self._finished: dict[int, int] = {}  # lease -> its word in the index
        self._sweep_at = SWEEP
        self._end = ""  # why the connection is over
        self.channel: Channel = connect(address)
        self.channel.send(Kind.JOIN, VERSION, text=name or "")

    def await_welcome(self) -> None:
        """Wait until the arena has answered."""
        if self._words is not None:
            return
        deadline = time.monotonic() + WELCOME_S
        with self._changed:
            while self._words is None:
                if self._end:
                    raise PeerGone(self._end)
                if time.monotonic() > deadline:
                    raise PeerGone(
                        f"The arena at {self.address} has not answered for {WELCOME_S:g} s; it may be stopped."
                    )
                self._changed.wait(LOOK_S)

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended."""
        return bool(self._end)

    def close(self) -> None:
        """Leave the arena: the parts of this reader are over, and its maps are given back."""
        self._host.forget(self)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<devguard.transport.Reader {self.name or 'without a name'} of {self.address}>"

    # What the arena says; called by the hub's thread.

    def hear(self) -> None:
        """Handle what has arrived; raises EOFError or PeerGone at the end of the connection."""
        for message in self.channel.receive():
            self._handle(message)

    def _handle(self, message: Message) -> None:
        with self._changed:
            if message.kind is Kind.WELCOME:
                self._index = Memory(message.descriptor, message.value).map()
                self._words = self._index.buffer().cast("Q")
            elif message.kind is Kind.SEGMENT:
                memory = Memory(message.descriptor, message.value)
                self._segments[message.number] = memory, memory.map()
            elif message.kind is Kind.CLOSE:
                self._segments.pop(message.number, None)
            elif message.kind is Kind.CANCEL:
                self.send(Kind.CONFIRM, message.number, int(message.number in self._inside))
            elif message.kind is Kind.REFUSE:
                raise PeerGone(f"The arena at {self.address} refuses: {message.text}")
            self._changed.notify_all()

    def send(self, kind: Kind, number: int, value: int = 0) -> None:
        """Send a message, at once or as soon as there is room."""
        if not self.channel.send(kind, number, value):
            self._host.flush_later(self)

    def end(self, why: str) -> None:
        """End the connection."""
        with self._changed:
            self._end = self._end or why
            self._segments.clear()
            self._index = self._words = None
            self._changed.notify_all()
        self.channel.close()

    # Leases.

    def open(self, handle: Named, by: object, *, stays: bool) -> tuple[Memory, Mapping] | None:
        """Begin to read a lease; return its segment, None if the payload travels in the handle.

        Until `finish`, its memory holds this payload. After an exception, call `put_back`. Where the payload travels
        in the handle, the arena only has to know of a reader that `stays` inside: its part is over when it dies.
        """
        number = handle.number
        with self._changed:
            self._check(handle)
            self._inside[number] = by  # first: an arena that cancels now either asks later, or has changed the word
            self._check_word(handle)
            # Before OPEN: a reader whose segment finds no descriptor is disconnected, and may then try again.
            while handle.data is None and handle.segment not in self._segments:
                self._changed.wait(LOOK_S)
                self._check_word(handle)
            if handle.data is None or stays:
                self.send(Kind.OPEN, number)
                if self.channel.is_broken:  # the arena would not know that this reader is inside
                    raise PeerGone(
                        f"The arena at {self.address} is closed, or another reader has taken the name of this one. "
                        f"The handle: {handle}."
                    )
            return None if handle.data is not None else self._segments[handle.segment]

    def _check(self, handle: Named) -> None:
        if handle.number in self._finished or handle.number in self._inside:
            raise HandleReleased(
                f"This reader{f' ({self.name})' if self.name else ''} has read {handle} before, or is reading it. A "
                f"handle is read once by each reader; keep the object."
            )
        if isinstance(handle.readers, tuple) and self.name not in handle.readers:
            raise HandleReleased(
                f"{handle} is for {', '.join(handle.readers)}. This reader "
                f"{f'is {self.name}' if self.name else 'has no name'}: call transport.join(handle.address, name=...)."
            )

    def _check_word(self, handle: Named) -> None:
        if self._end:
            raise PeerGone(f"{self._end} The handle: {handle}.")
        if self._words[handle.slot] != handle.number:
            raise HandleReleased(
                f"{handle} has ended: it was cancelled, its {_count(handle)} readers have all read it, or its arena is "
                f"closed."
            )

    def check_after(self, handle: Named) -> None:
        """Raise if the lease has ended while it was read: the arena did not know that this reader was inside."""
        with self._changed:
            has_ended = bool(self._end) or self._words[handle.slot] & ~CANCELLED != handle.number
        if has_ended:
            why = self._end or "As many readers as the put counts (to=) have read it meanwhile."
            raise HandleReleased(f"{handle} has ended while it was read. {why}")

    def check_view(self, handle: Named) -> None:
        """Raise if the lease has ended inside a view.

        After the end of the connection it has not been overwritten: a dead arena writes nothing, and one that lives
        has retired the segment, since it heard all that this reader had said.
        """
        with self._changed:
            words = self._words
            has_ended = handle.data is None and words is not None and words[handle.slot] & ~CANCELLED != handle.number
        if has_ended:
            raise HandleReleased(
                f"{handle} has ended while it was viewed, so that its memory may have changed: as many readers as the "
                f"put counts (to=) have read it, before the arena knew of this one."
            )

    def put_back(self, handle: Named, by: object) -> None:
        """Stop reading a lease that has not been read, if `by` reads it; it may be opened again."""
        with self._changed:
            if self._inside.get(handle.number) is not by:
                return
            del self._inside[handle.number]
        self.send(Kind.PUT_BACK, handle.number)

    def finish(self, handle: Named) -> None:
        """End this reader's part of a lease. Calling it twice does no harm."""
        self.send(Kind.ACKNOWLEDGE, handle.number)  # first: an interrupt after it costs no room
        with self._changed:
            self._finished[handle.number] = handle.slot
            self._inside.pop(handle.number, None)
            if len(self._finished) > self._sweep_at and not self._end:
                words = self._words
                self._finished = {
                    lease: slot for lease, slot in self._finished.items() if words[slot] & ~CANCELLED == lease
                }
                self._sweep_at = 2 * len(self._finished) + SWEEP

    def skip(self, handle: Named) -> None:
        """End this reader's part of a lease, unread."""
        with self._changed:
            self._check(handle)
        self.finish(handle)


def _count(handle: Named) -> int:
    return handle.readers if isinstance(handle.readers, int) else len(handle.readers)
