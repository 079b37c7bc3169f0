"""The thread of an arena: it accepts readers, hears what they say, notices their deaths, and warns of slow ones."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from devguard.errors import PeerGone
from devguard.support.notices import warn_user
from devguard.transport.leases import Segment
from devguard.transport.ledger import MAX_LEASES, Ledger
from devguard.transport.memory import Memory, explain, is_full
from devguard.transport.usage import Account
from devguard.transport.wire import VERSION, Channel, Kind, Message, listen, refuse_user

__all__ = ["INDEX", "Server"]

INDEX = 8 * MAX_LEASES  # bytes: one word for each lease
SLOW = 5.0  # seconds after which a put that waits is reported
PAUSE = 1.0  # seconds without accepting, where no descriptor is free


class Server:
    """The readers' side of an arena. Its thread is the only one that reads from the readers' sockets.

    Parameters
    ----------
    lock : RLock
        The arena's lock; held around each use of the ledger.
    ledger : Ledger
        The arena's books.
    index : Memory
        The words that say which leases may be opened.
    apply : callable
        Carries out the ledger's effects; the lock is held.
    end : callable
        ``end(why)`` ends the arena, if the thread ends by a fault.

    Attributes
    ----------
    account : Account
        Says what the arena holds.
    """

    def __init__(
        self, lock: Any, ledger: Ledger, index: Memory, apply: Callable[[], None], end: Callable[[str], None]
    ) -> None:
        self._lock, self._ledger, self._index, self._apply, self._end = lock, ledger, index, apply, end
        with contextlib.ExitStack() as opened:
            self._selector = selectors.DefaultSelector()
            opened.callback(self._selector.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, self._wake)
            self._listening, self.address = listen()
            opened.pop_all()
        self._channels: dict[int, Channel] = {}  # by reader; connected, not all of them joined
        self.account = Account(ledger, self._channels)
        self._segments: dict[int, tuple[Segment, Memory]] = {}
        self._tasks: deque[Callable[[], None]] = deque()
        self._next_reader = 1
        self._accept_again: float | None = None
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="devguard-arena", daemon=True)
        self._selector.register(self._wake, selectors.EVENT_READ, self._drain)
        self._selector.register(self._listening, selectors.EVENT_READ, self._accept)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the tasks that it has, and close everything."""
        self.post(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _stop(self) -> None:
        self._stopping = True

    def abandon(self) -> None:
        """Close this process's copies of the descriptors, in a forked child; the parent goes on."""
        self._stopping = self._ended = True
        self._selector.close()
        self._close_all()

    def _close_all(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._segments.clear()
        self._listening.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    # From other threads.

    def wake(self) -> None:
        """Let the thread look again. Never waits."""
        if self._wake >= 0:
            with contextlib.suppress(OSError):  # closed meanwhile, or a wake-up is under way
                os.eventfd_write(self._wake, 1)

    def post(self, task: Callable[[], None], *, wake: bool = True) -> None:
        """Let the thread run `task`, which raises nothing. Takes no lock, so finalizers can call it.

        Without `wake`, the task runs with the next one, or before the next message of a reader is heard.
        """
        self._tasks.append(task)
        if wake:
            self.wake()
        if self._ended:
            self._run_tasks()

    # With the lock held.

    def push_segment(self, segment: Segment, memory: Memory) -> None:
        """Send the memory of a segment to all readers."""
        self._segments[segment.number] = segment, memory
        for reader in self._ledger.names:
            self._send(reader, Kind.SEGMENT, segment.number, segment.nbytes, memory=memory)

    def push_close(self, segment: Segment) -> None:
        """Let all readers give a segment's memory back."""
        if self._segments.pop(segment.number, None) is not None:
            for reader in self._ledger.names:
                self._send(reader, Kind.CLOSE, segment.number)

    def ask(self, readers: Iterable[int], number: int) -> None:
        """Ask readers whether they are reading a lease that was cancelled."""
        for reader in readers:
            self._send(reader, Kind.CANCEL, number)

    def _send(self, reader: int, kind: Kind, *values: int, memory: Memory | None = None) -> None:
        channel = self._channels.get(reader)
        if channel is not None and not channel.send(kind, *values, memory=memory):
            self.post(partial(self._watch, reader))

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, mask in self._selector.select(self._tend()):
                    key.data(mask)
                self._run_tasks()
        except Exception as error:  # noqa: BLE001 - a fault of ours: readers and puts must not wait for ever
            why = f"has ended by a fault of devguard ({type(error).__name__}: {error})"
            self._end(why)
            warn_user(f"A devguard arena {why}; its readers are disconnected.")
        finally:
            self._stopping = self._ended = True
            self._run_tasks()  # what is posted from now on runs at once, and finds the arena closed
            self._selector.close()
            with contextlib.suppress(OSError):  # a forked child may hold a copy, where no reader must wait
                self._listening.shutdown(socket.SHUT_RDWR)
            self._close_all()

    def _run_tasks(self) -> None:
        while self._tasks:
            with contextlib.suppress(IndexError):  # another thread has taken it
                self._tasks.popleft()()

    def _tend(self) -> float | None:
        """Do what is due by the clock; return the seconds until the next such moment."""
        if not (self._ledger.segments or self._ledger.waiting or self._accept_again):
            return None
        now = time.monotonic()
        dues: list[float] = []
        if self._accept_again is not None:
            if now >= self._accept_again:
                self._accept_again = None
                self._selector.register(self._listening, selectors.EVENT_READ, self._accept)
            else:
                dues.append(self._accept_again - now)
        with self._lock:
            idle = self._ledger.expire(now)
            self._apply()
            text, slow = self._report_slow(now)
            site = self._ledger.waiting[0].site if text else None
        if site is not None:
            warn_user(text, at=(site.file, site.line))
        dues += [due for due in (idle, slow) if due is not None]
        return max(0.0, min(dues)) + 0.001 if dues else None

    def _report_slow(self, now: float) -> tuple[str, float | None]:
        """Return a warning about puts that have waited too long, and the seconds until the next one may be due."""
        waiting = self._ledger.waiting
        if not waiting:
            return "", None
        ticket = waiting[0]
        if ticket.reported:
            return "", SLOW
        waited = now - ticket.since
        if waited < SLOW:
            return "", SLOW - waited
        ticket.reported = True
        return (
            f"A put has waited {waited:.0f} s for room: {self._ledger.in_use:,} of {self._ledger.budget:,} bytes are "
            f"under a lease. {self.account.describe_leases()} The put that waits: {ticket.site}. Readers that do not "
            f"read must skip() their handle, and a sender that gives a request up must cancel() it."
        ), SLOW

    def _drain(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _accept(self, _: int) -> None:
        try:
            end, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if not is_full(error):
                return  # the reader has gone
            self._selector.unregister(self._listening)
            self._accept_again = time.monotonic() + PAUSE
            warn_user(f"A devguard arena cannot accept a reader, and tries again: {explain(error)}")
            return
        self._connect(end)

    def _connect(self, end: socket.socket) -> None:
        channel = Channel(end)
        refusal = refuse_user(channel)
        if not refusal and channel.lacks_descriptor:
            refusal = f"its process ({os.getpid()}) has no room for another file descriptor. Raise `ulimit -n` there."
        if refusal:
            channel.send(Kind.REFUSE, text=refusal[:300])
            channel.close()
            return
        reader, self._next_reader = self._next_reader, self._next_reader + 1
        self._channels[reader] = channel
        self._selector.register(channel.socket, selectors.EVENT_READ, partial(self._serve, reader))
        if channel.pidfd is not None:
            self._selector.register(channel.pidfd, selectors.EVENT_READ, partial(self._bury, reader))

    def _watch(self, reader: int) -> None:
        """Wait for room in a reader's socket."""
        channel = self._channels.get(reader)
        if channel is not None:
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            self._selector.modify(channel.socket, both, partial(self._serve, reader))

    def _serve(self, reader: int, mask: int) -> None:
        channel = self._channels.get(reader)
        if channel is None:
            return
        if mask & selectors.EVENT_WRITE and channel.flush():
            self._selector.modify(channel.socket, selectors.EVENT_READ, partial(self._serve, reader))
        if mask & selectors.EVENT_READ:
            self._hear(reader, channel)

    def _bury(self, reader: int, _: int = 0) -> None:
        """End a reader whose process is dead, after what it has said."""
        channel = self._channels.get(reader)
        if channel is not None:
            self._hear(reader, channel)
            self._drop(reader)

    def _hear(self, reader: int, channel: Channel) -> None:
        try:
            with self._lock:
                self._take(reader, channel)
                self._apply()
        except (EOFError, PeerGone):
            self._drop(reader)

    def _take(self, reader: int, channel: Channel) -> None:
        for message in channel.receive():
            if message.descriptor >= 0:
                os.close(message.descriptor)
            self._run_tasks()  # the put of the lease that the message is about
            self._handle(reader, channel, message)

    def _handle(self, reader: int, channel: Channel, message: Message) -> None:
        now, ledger = time.monotonic(), self._ledger
        if message.kind is Kind.JOIN:
            former = ledger.join(reader, message.text or None)
            self._send(reader, Kind.WELCOME, VERSION, INDEX, memory=self._index)
            for segment, memory in self._segments.values():
                self._send(reader, Kind.SEGMENT, segment.number, segment.nbytes, memory=memory)
            if former is not None:
                self._drop(former)
        elif message.kind is Kind.OPEN:
            ledger.open(reader, message.number)
        elif message.kind is Kind.ACKNOWLEDGE:
            ledger.acknowledge(reader, message.number, now)
        elif message.kind is Kind.PUT_BACK:
            ledger.put_back(reader, message.number, now)
        elif message.kind is Kind.CONFIRM:
            ledger.confirm(reader, message.number, bool(message.value), now)

    def _drop(self, reader: int) -> None:
        """Forget a reader: its parts are over."""
        channel = self._channels.get(reader)
        if channel is None:
            return
        # Another reader may have taken its name while it lives. It opens nothing from now on, and what it has opened
        # is known, so that its bytes are not used again.
        channel.stop_receiving()
        with self._lock, contextlib.suppress(EOFError, PeerGone):
            self._take(reader, channel)
        if self._channels.pop(reader, None) is None:
            return
        for watched in (channel.socket, channel.pidfd):
            if watched is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(watched)
        channel.close()
        with self._lock:
            self._ledger.leave(reader, time.monotonic())
            self._apply()
