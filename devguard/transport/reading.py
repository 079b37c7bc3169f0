"""Reading handles in this process: its readers, the thread that listens for them, and the copying of payloads."""

from __future__ import annotations

import contextlib
import os
import selectors
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from devguard.errors import ConfigError, PeerGone
from devguard.ownership import in_force
from devguard.support import forks
from devguard.transport import pinning, unpack
from devguard.transport.memory import Mapping, Memory, Use, explain
from devguard.transport.reader import Named, Reader
from devguard.transport.wire import MAX_NAME, describe

__all__ = ["join", "keep", "look", "Opened", "read", "Sent", "skip"]


class Sent(Named, Protocol):
    """What a handle says of its payload, too."""

    address: str
    offset: int
    nbytes: int


class _Hub:
    """The readers of this process, and the thread that listens for them."""

    def __init__(self) -> None:
        self._lock = forks.new_lock()
        self.readers: dict[str, dict[str | None, Reader]] = {}
        self._selector: selectors.BaseSelector | None = None
        self._wake = -1
        self._tasks: deque[Callable[[], None]] = deque()

    def find(self, address: str, name: str | None) -> Reader:
        """Return the reader of an arena; connect if there is none."""
        with self._lock:
            known = {other: reader for other, reader in self.readers.get(address, {}).items() if not reader.is_over}
            if name in known:
                reader = known[name]
            elif name is None and len(known) == 1:
                reader = next(iter(known.values()))
            elif name is None and known:
                names = ", ".join(sorted(str(other) for other in known))
                raise ConfigError(f"This process has joined the arena as {names}: say which, by reader=.")
            else:
                reader = Reader(address, name, self)
                try:
                    self._listen(reader)
                except OSError as error:
                    reader.end(f"cannot listen to the arena at {address}: {explain(error)}")
                    raise PeerGone(f"cannot listen to the arena at {address}: {explain(error)}") from error
                self.readers.setdefault(address, {})[name] = reader
        try:  # also for one that is known: another thread may be connecting it just now
            reader.await_welcome()
        except BaseException:
            self.forget(reader)
            raise
        return reader

    def _listen(self, reader: Reader) -> None:
        if self._selector is None:
            selector = selectors.DefaultSelector()
            try:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except BaseException:
                selector.close()
                raise
            self._selector = selector
            self._selector.register(self._wake, selectors.EVENT_READ, self._drain)
            threading.Thread(target=self._run, args=(self._selector,), name="devguard-reader", daemon=True).start()
        self._selector.register(reader.channel.socket, selectors.EVENT_READ, partial(self._serve, reader))
        if reader.channel.pidfd is not None:
            self._selector.register(reader.channel.pidfd, selectors.EVENT_READ, partial(self._bury, reader))

    def forget(self, reader: Reader, why: str = "") -> None:
        """End a reader."""
        with self._lock:
            known = self.readers.get(reader.address, {})
            if known.get(reader.name) is reader:
                del known[reader.name]
                if not known:
                    self.readers.pop(reader.address, None)
            if self._selector is not None:
                for watched in (reader.channel.socket, reader.channel.pidfd):
                    if watched is not None:
                        with contextlib.suppress(KeyError, ValueError):  # it is not watched any more
                            self._selector.unregister(watched)
        reader.end(why or "This reader has left the arena.")

    def flush_later(self, reader: Reader) -> None:
        """Let the thread send what a reader's socket did not take."""
        self.post(partial(self._watch, reader, selectors.EVENT_READ | selectors.EVENT_WRITE))

    def post(self, task: Callable[[], None]) -> None:
        """Let the thread run `task`, which raises nothing. Takes no lock, so finalizers can call it."""
        self._tasks.append(task)
        try:  # noqa: SIM105 - contextlib is None at the end of the interpreter, and so is `os`
            os.eventfd_write(self._wake, 1)
        except (OSError, AttributeError):  # a wake-up is under way
            pass

    def _drain(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._tasks:
            self._tasks.popleft()()

    def _run(self, selector: selectors.BaseSelector) -> None:
        while True:
            for key, mask in selector.select():
                key.data(mask)
                del key  # it keeps a reader that may be over, and so its map of the index, until the next event

    def _serve(self, reader: Reader, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE and reader.channel.flush():
                self._watch(reader, selectors.EVENT_READ)
            if mask & selectors.EVENT_READ:
                reader.hear()
        except EOFError:
            process = describe(reader.channel)
            self.forget(reader, f"The arena at {reader.address} is closed, or its process has ended ({process}).")
        except (PeerGone, OSError) as error:
            self.forget(reader, str(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours in one connection: the others go on
            self.forget(reader, f"The connection has ended by a fault of devguard: {type(error).__name__}: {error}.")

    def _watch(self, reader: Reader, events: int) -> None:
        with contextlib.suppress(KeyError, ValueError):  # another thread has closed it
            if self._selector is not None:
                self._selector.modify(reader.channel.socket, events, partial(self._serve, reader))

    def _bury(self, reader: Reader, _: int) -> None:
        self._serve(reader, selectors.EVENT_READ)
        self.forget(reader, f"The process of the arena at {reader.address} has ended.")

    def abandon(self) -> None:
        """Close this process's copies of the descriptors, in a forked child, which connects again."""
        if self._selector is not None:
            self._selector.close()
            os.close(self._wake)
        for readers in self.readers.values():
            for reader in readers.values():
                reader.end("This process was forked from the reader's.")
        self.__init__()  # type: ignore[misc]


_hub = _Hub()
os.register_at_fork(after_in_child=_hub.abandon)


def join(address: str, name: str | None = None) -> Reader:
    """Connect to an arena before the first message from it.

    The first read of a handle connects, too. Joining is for a reader that puts address by name, and moves the
    cost of connecting out of the first read.

    Parameters
    ----------
    address : str
        ``arena.address`` or ``handle.address``.
    name : str, optional
        The name by which ``put(to=[...])`` addresses this reader. One that joins under the same name later, in any
        process, takes its place.

    Returns
    -------
    Reader
        Close it to leave; otherwise it lives as long as the process, or the arena.

    Raises
    ------
    PeerGone
        There is no such arena, or it belongs to another user.
    ConfigError
        The name is not valid.
    """
    if name is not None and not (isinstance(name, str) and 0 < len(name.encode()) <= MAX_NAME):
        raise ConfigError(f"name={name!r}: valid is a text of 1 to {MAX_NAME} bytes.")
    return _hub.find(address, name)


class Opened:
    """A lease that is being read, from `open` to `finish` or `put_back`."""

    def __init__(self, handle: Sent, name: str | None) -> None:
        self._handle = handle
        self._reader = _hub.find(handle.address, name)

    def open(self, *, stays: bool) -> tuple[Memory, Mapping] | None:
        """Begin to read; return the segment, None if the payload travels in the handle."""
        return self._reader.open(self._handle, self, stays=stays)

    def finish(self) -> None:
        """End this reader's part."""
        self._reader.finish(self._handle)

    def check_view(self) -> None:
        """Raise if the payload may have been overwritten while it was used in place."""
        self._reader.check_view(self._handle)

    def put_back(self) -> None:
        """Leave the lease unread, so that it may be opened again."""
        self._reader.put_back(self._handle, self)

    def unpack(self, source: memoryview, way: unpack.Way) -> Any:
        """Return the object, if the payload was there from the beginning to the end."""
        try:
            value = unpack.unpack(source, way)
        except Exception:  # what has been overwritten fails to unpickle in any way: the check names the cause
            self._reader.check_after(self._handle)
            raise
        self._reader.check_after(self._handle)
        return value


def read(handle: Sent, device: Any, name: str | None) -> Any:
    """Return a copy of the object of a handle; see `Handle.get`."""
    opened = Opened(handle, name)
    try:
        _, mapping = opened.open(stays=False) or (None, None)
        if mapping is None:
            source = memoryview(bytearray(handle.data or b""))
        else:
            source = mapping.buffer(handle.offset, handle.nbytes)

        def place(on_accelerator: bool) -> Any:
            target = _find_device(on_accelerator) if device is None else device
            if target is not None and mapping is not None:
                pinning.pin(mapping, target, read_only=True)
            return target

        value = opened.unpack(source, unpack.Way(True, place))
        opened.finish()
    except BaseException:
        opened.put_back()
        raise
    return value


def look(handle: Sent, opened: Opened) -> Any:
    """Return the object of a handle, in place; see `Handle.view`."""
    return _map(handle, opened)[0]


def keep(handle: Sent, name: str | None = None) -> Any:
    """Return the object of a handle, in place; this reader's part is over when the last of its memory is collected.

    For a framework that keeps tensors as long as it needs them, and has no scope for `Handle.view`.
    """
    opened = Opened(handle, name)
    value, use = _map(handle, opened)
    if use is None:  # the payload travelled in the handle
        opened.finish()
    else:
        # A finalizer can run inside any call, also one that holds the reader's locks.
        use.at_end = partial(_hub.post, opened.finish)
    return value


def _map(handle: Sent, opened: Opened) -> tuple[Any, Use | None]:
    use = None
    try:
        memory, _ = opened.open(stays=True) or (None, None)
        if memory is None:
            source: Any = bytearray(handle.data or b"")
        else:
            source, use = memory.view(handle.offset, handle.nbytes)
        value = opened.unpack(source, unpack.Way(False, lambda _: None))
    except BaseException:
        opened.put_back()
        raise
    return value, use


def skip(handle: Sent, name: str | None) -> None:
    """End this reader's part of a lease, unread; see `Handle.skip`."""
    try:
        reader = _hub.find(handle.address, name)
    except PeerGone:
        return
    reader.skip(handle)


def _find_device(on_accelerator: bool) -> Any:
    """Return where a tensor goes: from an accelerator to the owner, or to the current device; else to the host."""
    if not on_accelerator:
        return None
    owner = in_force.owner()
    if owner is not None:
        return owner.tag if owner.index >= 0 else None
    torch = sys.modules["torch"]
    return "cuda" if torch.cuda.is_available() else None
