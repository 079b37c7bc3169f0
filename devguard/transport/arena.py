"""An arena: memory that one process fills, and that readers of the same machine read, under a budget.

An arena belongs to the process that made it. It has a thread of its own, which talks to the readers: a blocked event
loop does not matter. `ledger` keeps the books, `payload` knows objects, `wire` carries messages.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import concurrent.futures.thread  # now, since a lazy import needs a descriptor
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from devguard.errors import BudgetFull, ConfigError, DevGuardError
from devguard.support import forks
from devguard.transport import payload, pinning
from devguard.transport.arguments import PutSite, check_readers, find_site, parse_budget
from devguard.transport.handle import INLINE, Handle, senders
from devguard.transport.leases import Lease, Readers, Segment, Ticket, round_up
from devguard.transport.ledger import Ledger
from devguard.transport.memory import Mapping, Memory, explain
from devguard.transport.server import INDEX, Server
from devguard.transport.usage import Usage
from devguard.transport.wire import CANCELLED

__all__ = ["Arena"]

T = TypeVar("T")

AHEAD = 64  # leases that are made before they are needed


class Arena:
    """Memory that this process fills with objects, for readers in other processes of this machine.

    The arena owns the memory. A reader owns the copy that it gets. What `put` was given stays the caller's.

    Parameters
    ----------
    device : str
        Where the bytes lie: ``"cpu"``, the host's memory.
    budget : int or str
        The most bytes under a lease, such as ``"1GiB"`` or ``1 << 30``; at least 64 KiB.

    Raises
    ------
    ConfigError
        An argument is not valid.
    DevGuardError
        The system gives no memory, no descriptor or no socket, or is not Linux.

    Examples
    --------
    >>> arena = transport.Arena("cpu", budget="1GiB")
    >>> handle = arena.put({"pixel_values": pixels}, to=4)
    """

    def __init__(self, device: str = "cpu", *, budget: int | str) -> None:
        if device != "cpu":
            raise ConfigError(f"Arena({device!r}): valid is 'cpu'. Arenas in GPU memory are not built yet.")
        if not sys.platform.startswith("linux"):
            raise DevGuardError("devguard.transport needs Linux: memfd, abstract sockets and pidfd.")
        self.budget = parse_budget(budget)
        self._pid = os.getpid()
        self._lock = forks.new_lock()
        self._ledger = Ledger(self.budget)
        self._index, mapping = Memory.make(INDEX)
        self._words = mapping.buffer().cast("Q")
        self._memory: dict[int, tuple[Memory, Mapping]] = {}
        self._ahead: deque[Lease] = deque()  # for payloads that travel in their handles
        self._tickets: dict[Ticket, concurrent.futures.Future[Any]] = {}
        self._closed = ""
        # Its one thread copies for `put_async`, and starts with the first of them.
        self._copier = concurrent.futures.ThreadPoolExecutor(1, "devguard-arena-copy")
        try:
            sampler = _import_sampler()
            self._server = Server(self._lock, self._ledger, self._index, self._apply, self._end)
        except OSError as error:
            raise DevGuardError(f"cannot make an arena: {explain(error)}") from error
        self.address = self._server.address
        senders[self.address] = self
        self._server.start()
        sampler.add_source("arenas", self.sample)

    # Puts.

    def put(
        self,
        value: Any,
        *,
        to: int | Sequence[str] = 1,
        block: bool = True,
        timeout: float | None = None,
        oversize: bool = False,
    ) -> Handle:
        """Copy an object into the arena and return its handle. Afterwards `value` is the caller's again.

        Parameters
        ----------
        value : object
            Anything picklable: tensors on any device, arrays, bytes, and nests of them.
        to : int or sequence of str
            How many readers read it, whichever they are; or the names of its readers.
        block : bool
            Whether to wait while the budget is full.
        timeout : float, optional
            The most seconds to wait.
        oversize : bool
            Whether an object larger than the budget may be put: alone, after all others have ended.

        Returns
        -------
        Handle
            To be sent by any message, pickled, over any number of hops. It holds the bytes itself up to 64 KiB.

        Raises
        ------
        BudgetFull
            There is no room now (``block=False``), after `timeout`, or ever.
        ConfigError
            `to` is not valid.
        DevGuardError
            The arena is closed, or belongs to another process; the system has no memory.
        pickle.PicklingError, TypeError
            The object cannot be pickled.
        """
        site = find_site(sys._getframe(1))
        readers = check_readers(to)
        self._check_open()
        packed = payload.pack(value)
        if packed.nbytes <= INLINE and self._ahead:
            return self._put_inline(packed, readers, site)
        ticket = self._make_ticket(packed.nbytes, readers, site, oversize)
        granted: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            self._server.post(lambda: self._request(ticket, granted, wait=block))
            lease = self._await(ticket, granted, timeout if block else None)
            return self._fill(lease, packed)
        except BaseException:
            self._server.post(lambda: self._withdraw(ticket))
            raise

    def _put_inline(self, packed: payload.Packed, readers: Readers, site: PutSite) -> Handle:
        """Put a payload that travels in its handle, without waiting for the arena's thread."""
        lease = self._ahead.popleft()
        try:
            data, nbytes = packed.to_bytes(), packed.nbytes
            with self._lock:
                self._check_open()
                self._words[lease.slot] = lease.number
            # Before the handle leaves, and so before any message about the lease.
            self._server.post(lambda: self._publish(lease, readers, site, nbytes), wake=len(self._ahead) < AHEAD // 2)
            return self._handle(lease, readers, site, nbytes, data)
        except BaseException:
            self._server.post(lambda: self._give_up(lease))
            raise

    async def put_async(self, value: Any, *, to: int | Sequence[str] = 1, oversize: bool = False) -> Handle:
        """Copy an object into the arena without blocking the event loop; see `put`.

        The object is pickled at once; its tensors and arrays are copied in a thread, and belong to the arena until the
        call returns. If the await is cancelled, its room is given back.
        """
        site = find_site(sys._getframe(1))
        readers = check_readers(to)
        self._check_open()
        packed = payload.pack(value)
        ready = [_record_event(device) for device in packed.devices]
        ticket = self._make_ticket(packed.nbytes, readers, site, oversize)
        granted: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            self._server.post(lambda: self._request(ticket, granted, wait=True))
            lease = await asyncio.wrap_future(granted)
            return await asyncio.wrap_future(self._submit(self._fill, lease, packed, ready))
        except BaseException:
            # By the thread that copies, so that a copy that it has begun has ended. A closed arena has no lease.
            with contextlib.suppress(DevGuardError):
                self._submit(self._server.post, lambda: self._withdraw(ticket))
            raise

    def _submit(self, function: Callable[..., T], *arguments: Any) -> concurrent.futures.Future[T]:
        """Let the thread that copies call a function."""
        try:
            return self._copier.submit(function, *arguments)
        except RuntimeError as error:  # it is closed, or the interpreter ends
            raise DevGuardError(f"This arena {self._closed or 'ends with its process'}.") from error

    def _make_ticket(self, nbytes: int, readers: Readers, site: PutSite, oversize: bool) -> Ticket:
        needed = 0 if nbytes <= INLINE else round_up(nbytes)
        if needed > self.budget and not oversize:
            raise BudgetFull(
                f"A payload of {nbytes:,} bytes does not fit into the budget of {self.budget:,} bytes, also when it is "
                f"empty. Put it in parts, give the arena a larger budget, or pass oversize=True: it then travels "
                f"alone. Put at {site}."
            )
        return Ticket(needed, readers, site, time.monotonic(), nbytes)

    def _await(self, ticket: Ticket, granted: concurrent.futures.Future[Any], timeout: float | None) -> Lease:
        try:
            lease: Lease = granted.result(timeout)
            return lease
        except (TimeoutError, concurrent.futures.TimeoutError):  # two classes in Python 3.10
            with self._lock:
                raise self._server.account.full(ticket, f" after {timeout:g} s") from None

    def _fill(self, lease: Lease, packed: payload.Packed, ready: Sequence[Any] = ()) -> Handle:
        """Write a payload into its place, after the events `ready`; let readers open it, and return its handle."""
        for event in ready:
            with sys.modules["torch"].cuda.device(event.device):  # this thread may be on the GPU of another process
                event.synchronize()
        data = None
        if lease.segment is None:
            data = packed.to_bytes()
        else:
            self._write(lease, lease.segment, packed)
        with self._lock:
            self._check_open()
            if lease.number in self._ledger.leases:  # else its readers have died meanwhile: the slot is another lease's
                self._words[lease.slot] = lease.number
        return self._handle(lease, lease.readers, lease.site, packed.nbytes, data)

    def _handle(self, lease: Lease, readers: Readers, site: PutSite, nbytes: int, data: bytes | None) -> Handle:
        segment = 0 if lease.segment is None else lease.segment.number
        return Handle(
            self.address, lease.number, readers, lease.slot, segment, lease.offset, nbytes, data, str(site), self
        )

    def _write(self, lease: Lease, segment: Segment, packed: payload.Packed) -> None:
        # Apart from `_fill`: the traceback of an error that it raises would keep the map of an arena that is closed.
        with self._lock:
            self._check_open()
            if lease.number not in self._ledger.leases:
                return
            mapping = self._memory[segment.number][1]
        if packed.devices:
            pinning.pin(mapping, packed.devices[0])
        packed.write(mapping.buffer(lease.offset, packed.nbytes))

    # In the arena's thread, which alone changes the books: Ctrl-C interrupts the main thread at any line.

    def _request(self, ticket: Ticket, granted: concurrent.futures.Future[Any], *, wait: bool) -> None:
        """Queue a request; its future has the lease, or the reason why there is none."""
        with self._lock:
            if self._closed:
                _fail(granted, DevGuardError(f"This arena {self._closed}."))
                return
            self._tickets[ticket] = granted
            self._ledger.request(ticket, time.monotonic())
            self._apply()
            if not ticket.nbytes:
                self._make_ahead()
            if ticket.lease is None and not wait:
                error = self._server.account.full(ticket, "")
                self._withdraw(ticket)
                _fail(granted, error)

    def _publish(self, lease: Lease, readers: Readers, site: PutSite, nbytes: int) -> None:
        """Enter a lease that travels already."""
        with self._lock:
            if not self._closed:
                self._ledger.publish(lease, readers, site, time.monotonic(), nbytes)
                self._make_ahead()

    def _make_ahead(self) -> None:
        self._ahead.extend(self._ledger.make_ahead(AHEAD - len(self._ahead)))

    def _give_up(self, lease: Lease) -> None:
        """End a lease of a payload in a handle, of which no reader knows."""
        with self._lock:
            if not self._closed:
                self._ledger.give_up(lease, time.monotonic())
                self._apply()

    def _withdraw(self, ticket: Ticket) -> None:
        """Give up a request, or its lease, of which no reader knows."""
        with self._lock:
            self._tickets.pop(ticket, None)
            if not self._closed:
                self._ledger.withdraw(ticket, time.monotonic())
                self._apply()

    # Effects of the ledger; the lock is held.

    def _apply(self) -> None:
        """Carry out what the ledger asks for, until it asks for nothing more."""
        while effects := self._ledger.take_effects():
            for lease in effects.ended:
                if self._words[lease.slot] & ~CANCELLED == lease.number:
                    # A closed arena overwrites nothing: readers that are inside may finish.
                    self._words[lease.slot] = lease.number | CANCELLED if self._closed else 0
            for segment in effects.closed:
                self._memory.pop(segment.number, None)
                self._server.push_close(segment)
            for segment in effects.made:
                self._make(segment)
            for ticket in effects.granted:
                granted = self._tickets.pop(ticket, None)
                if granted is not None:
                    with contextlib.suppress(concurrent.futures.InvalidStateError):  # the put has been cancelled
                        granted.set_result(ticket.lease)

    def _make(self, segment: Segment) -> None:
        try:
            self._memory[segment.number] = memory, _ = Memory.make(segment.nbytes)
        except DevGuardError as error:
            segment.retired = True
            for ticket, granted in list(self._tickets.items()):
                if ticket.lease is not None and ticket.lease.segment is segment:
                    del self._tickets[ticket]
                    _fail(granted, error)  # the put withdraws its ticket
        else:
            self._server.push_segment(segment, memory)

    # The end.

    def cancel(self, number: int) -> None:
        """Cancel a lease; used by `Handle.cancel`. Also called by finalizers, so it only asks the arena's thread."""
        self._server.post(lambda: self._cancel(number))

    def _cancel(self, number: int) -> None:
        with self._lock:
            lease = self._ledger.leases.get(number)
            if lease is None or self._closed:
                return
            # Before the readers are asked: from now on none opens it. It may not have been filled yet.
            self._words[lease.slot] = lease.number | CANCELLED
            self._server.ask(self._ledger.cancel(number, time.monotonic()), number)
            self._apply()

    def usage(self) -> Usage:
        """Return what the arena holds now."""
        found: concurrent.futures.Future[Usage] = concurrent.futures.Future()

        def look() -> None:
            with self._lock:
                found.set_result(self._server.account.usage())

        self._server.post(look)
        return found.result()

    def sample(self) -> dict[str, Any]:
        """Return what the arena holds, as plain data, for the log of this process; see `Account.sample`."""
        self._server.wake()  # to enter what was put without a wake-up, for the next sample
        with self._lock:
            return {"kind": "cpu", "address": self.address, **self._server.account.sample()}

    def close(self) -> None:
        """End all leases, give the memory back and disconnect the readers.

        A reader that is reading keeps its memory until it has finished; a later `get` raises HandleReleased or
        PeerGone. Puts that wait raise DevGuardError.
        """
        if os.getpid() == self._pid:
            self._server.post(lambda: self._end("is closed"))
            self._server.stop()
            self._copier.shutdown()
            self._release_index()

    def _release_index(self) -> None:
        with self._lock:
            self._index.close()
            self._words = memoryview(b"")

    def _end(self, why: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = why
            _import_sampler().remove_source("arenas", self.sample)
            self._ledger.end_all(time.monotonic())
            self._apply()
            waiting, self._tickets = self._tickets, {}
        for granted in waiting.values():
            _fail(granted, DevGuardError(f"The arena {why}; this put waited for room."))

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("An Arena belongs to its process and cannot be pickled: send the handles that put() returns.")

    def __repr__(self) -> str:
        state = self._closed or f"{self._ledger.in_use:,} of {self.budget:,} bytes in use"
        return f"<devguard.transport.Arena('cpu'): {state}>"

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise DevGuardError(
                f"This arena belongs to process {self._pid}, which forked this one ({os.getpid()}). Make an arena in "
                f"the process that puts."
            )
        if self._closed:
            raise DevGuardError(f"This arena {self._closed}.")

    def abandon(self) -> None:
        """Let go of what a fork has copied into this child, which must not hold the parent's connections open."""
        self._closed = "belongs to the process that forked this one"
        _import_sampler().remove_source("arenas", self.sample)
        self._server.abandon()
        self._memory.clear()
        self._release_index()


def _abandon_all() -> None:
    for arena in list(senders.values()):
        arena.abandon()
    senders.clear()


os.register_at_fork(after_in_child=_abandon_all)


def _import_sampler() -> ModuleType:
    """Return the module that samples arenas. A process that only reads, or passes handles on, does not load it."""
    from devguard.reporting import sampler

    return sampler


def _fail(granted: concurrent.futures.Future[Any], error: Exception) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # the put has been cancelled
        granted.set_exception(error)


def _record_event(device: Any) -> Any:
    """Return an event after the work that was queued on the current stream of a GPU."""
    return sys.modules["torch"].cuda.current_stream(device).record_event()
