"""A handle: what travels in a message in place of an object that lies in an arena."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Protocol

from devguard.errors import DevGuardError
from devguard.transport import reading
from devguard.transport.leases import Readers
from devguard.transport.reading import Opened

__all__ = ["Handle", "INLINE", "senders", "View"]

INLINE = 1 << 16  # bytes up to which a payload travels in its handle


class Sender(Protocol):
    """An arena of this process."""

    def cancel(self, number: int) -> None:
        """Cancel a lease."""

    def abandon(self) -> None:
        """Let go of what a fork has copied."""


senders: weakref.WeakValueDictionary[str, Sender] = weakref.WeakValueDictionary()  # by address


class Handle:
    """An object in an arena. The arena owns its memory, until each of its readers has read it once.

    It may be pickled and sent on any number of times, which changes nothing. A process that only passes it on opens
    nothing. Made by `Arena.put`.

    Attributes
    ----------
    address : str
        The arena, for `join`.
    number : int
        The lease, as errors and `Arena.usage` name it.
    readers : int or tuple of str
        How many readers read it, or their names.
    nbytes : int
        The size of the payload, with what describes it.
    site : str
        The line of the put.
    """

    __slots__ = ("_arena", "_data", "address", "nbytes", "number", "offset", "readers", "segment", "site", "slot")

    def __init__(
        self,
        address: str,
        number: int,
        readers: Readers,
        slot: int,
        segment: int,
        offset: int,
        nbytes: int,
        data: bytes | None,
        site: str,
        arena: Sender | None = None,
    ) -> None:
        self.address, self.number, self.readers, self.slot = address, number, readers, slot
        self.segment, self.offset, self.nbytes, self._data, self.site = segment, offset, nbytes, data, site
        self._arena = arena  # only until it is pickled: then the lease no longer ends with this object

    @property
    def data(self) -> bytes | None:
        """The payload itself, if it travels in the handle."""
        return self._data

    def get(self, device: Any = None, *, reader: str | None = None) -> Any:
        """Return a copy of the object, which is the caller's. This reader's part of the lease is over.

        Parameters
        ----------
        device : device, optional
            Where all tensors go. By default tensors that were on an accelerator go to the owner of this process or
            scope (without an owner: to the current device), and the others stay on the host.
        reader : str, optional
            The name of the reader, where this process has joined the arena under several.

        Returns
        -------
        object
            As it was put; tensors and arrays are writable, and on the device when this returns.

        Raises
        ------
        HandleReleased
            The lease has ended or was cancelled, or this reader has read it before.
        PeerGone
            The arena's process has ended or cannot be reached.
        """
        return reading.read(self, device, reader)

    def view(self, *, reader: str | None = None) -> View:
        """Return a scope in which the object is used in place, without a copy; at its end this reader's part is over.

        Tensors are on the host. Writing to them changes nothing for others. After the scope their memory stays valid,
        but its contents are not defined. Where more readers open it than the put counts, it may be overwritten inside
        the scope: its end then raises HandleReleased.

        Parameters
        ----------
        reader : str, optional
            As for `get`.
        """
        return View(self, reader)

    def skip(self, *, reader: str | None = None) -> None:
        """End this reader's part of the lease, unread. A lease that has ended is left alone.

        Parameters
        ----------
        reader : str, optional
            As for `get`.
        """
        reading.skip(self, reader)

    def cancel(self) -> None:
        """End the lease: no reader needs it any more. Only in the process that has put it.

        A reader that is reading finishes; each other one gets HandleReleased. The memory is free when all have said
        so. Cancelling twice, or after all have read it, does nothing.

        Raises
        ------
        DevGuardError
            This process has not put it.
        """
        arena = senders.get(self.address)
        if arena is None:
            raise DevGuardError(
                f"Only the process that has put {self} can cancel it. A reader that does not want it calls skip()."
            )
        arena.cancel(self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        self._arena = None
        return Handle, (
            self.address, self.number, self.readers, self.slot, self.segment, self.offset, self.nbytes, self._data,
            self.site,
        )  # fmt: skip

    def __del__(self) -> None:
        arena = getattr(self, "_arena", None)
        if arena is not None:  # it was never sent, so that no reader can have it
            arena.cancel(self.number)

    def __str__(self) -> str:
        return f"lease {self.number} ({self.nbytes:,} bytes, put at {self.site})"

    def __repr__(self) -> str:
        return f"<devguard.transport.Handle: {self}>"


class View:
    """A scope in which the object of a handle is used in place; made by `Handle.view`."""

    def __init__(self, handle: Handle, reader: str | None) -> None:
        self._handle, self._reader = handle, reader
        self._opened: Opened | None = None

    def __enter__(self) -> Any:
        self._opened = Opened(self._handle, self._reader)
        return reading.look(self._handle, self._opened)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            try:
                if kind is None:
                    opened.check_view()
                opened.finish()
            except BaseException:  # an interrupt, too; the lease must not wait for this reader
                opened.finish()
                raise
