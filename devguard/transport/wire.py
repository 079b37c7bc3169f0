"""The wire between an arena and its readers: short messages, memory and deaths over a Unix socket.

A message is 32 bytes, a short text, and at most one file descriptor. Nothing here unpickles, and no send waits: what
the socket does not take at once stays in the channel's outbox, in order. The address is an abstract socket with 128
random bits; both sides check that the other one belongs to the same user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from devguard.errors import PeerGone
from devguard.support import forks
from devguard.transport.memory import MORE_ROOM, Memory, is_full

__all__ = ["CANCELLED", "Channel", "connect", "describe", "Kind", "listen", "Message", "MAX_NAME"]

VERSION = 1
MAX_NAME = 100  # bytes of a reader's name
CONNECT_TIMEOUT = 10.0  # seconds
CROWDED_S = 0.01  # seconds between attempts to send, while too many descriptors are on their way

_HEADER = struct.Struct("=IIQQQ")
_ROOM = _HEADER.size + 4 * MAX_NAME
_SO_PEERPIDFD = 77  # Linux 6.5; the socket module of Python 3.10 to 3.14 does not name it
_ANCILLARY = socket.CMSG_SPACE(4)
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_PREFIX = "devguard-transport-"


CANCELLED = 1 << 63  # added to a lease's word in the index: readers inside finish, and no other one opens it


class Kind(IntEnum):
    """What a message says."""

    # A reader to its arena.
    JOIN = 1  # version; the reader's name
    OPEN = 2  # lease: it is being read
    ACKNOWLEDGE = 3  # lease: it has been read
    CONFIRM = 4  # lease, 1 where it is being read: the answer to CANCEL
    PUT_BACK = 10  # lease: it is not being read any more, and has not been read
    # An arena to a reader.
    WELCOME = 5  # version, bytes of the index; the index
    SEGMENT = 6  # segment, bytes; its memory
    CLOSE = 7  # segment
    CANCEL = 8  # lease
    REFUSE = 9  # the reason


class Message(NamedTuple):
    """A message that has arrived.

    Attributes
    ----------
    kind : Kind
        What it says.
    number, value : int
        A lease or a segment, and what the kind adds.
    text : str
        A name or a reason.
    descriptor : int
        A file descriptor, which belongs to the receiver; -1 if there is none.
    """

    kind: Kind
    number: int
    value: int
    text: str
    descriptor: int


class Channel:
    """One end of a connection between an arena and a reader. It owns its socket and its pidfd."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end
        self._process = os.getpid()
        self.pid, self.uid = _credentials(end)
        self.lacks_descriptor = False  # this process has no room for the pidfd
        try:
            self.pidfd = _open_pidfd(end, self.pid)
        except OSError:
            self.pidfd, self.lacks_descriptor = None, True
        self._lock = forks.new_lock()
        self._outbox: deque[tuple[bytes, Memory | None]] = deque()
        self.closed = False
        self.is_broken = False  # the other end takes no messages any more
        self._crowded = False

    def send(
        self, kind: Kind, number: int = 0, value: int = 0, *, text: str = "", memory: Memory | None = None
    ) -> bool:
        """Send a message and the descriptor of `memory`, or put them into the outbox. Never waits.

        Returns
        -------
        bool
            Whether everything has left; if not, call `flush` when the socket can be written.
        """
        encoded = text.encode("utf-8", "surrogateescape")
        message = _HEADER.pack(VERSION, kind, number, value, len(encoded)) + encoded
        with self._lock:
            if self.closed:
                return True
            if not self._outbox and self._try(message, memory):
                return True
            self._outbox.append((message, memory))
            return False

    def flush(self) -> bool:
        """Send what is in the outbox; return whether it is empty now."""
        with self._lock:
            while self._outbox:
                if not self._try(*self._outbox[0]):
                    if self._crowded:  # the socket has room, so that waiting for it would not wait
                        time.sleep(CROWDED_S)
                    return False
                self._outbox.popleft()
            return True

    def _try(self, message: bytes, memory: Memory | None) -> bool:
        """Send one message; return whether it is off our hands: sent, or for a peer that is gone."""
        try:
            if memory is None:
                self.socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                socket.send_fds(self.socket, [message], [memory.descriptor], flags)
        except BlockingIOError:
            self._crowded = False
            return False
        except OSError as error:
            self._crowded = error.errno == errno.ETOOMANYREFS  # too many descriptors on their way
            self.is_broken = not self._crowded
            return self.is_broken
        return True

    def receive(self) -> Iterator[Message]:
        """Yield the messages that have arrived.

        Raises
        ------
        EOFError
            The other end is closed.
        PeerGone
            A message is not of this protocol, or its descriptor found no room in this process.
        """
        while True:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(_ROOM, _ANCILLARY, _RECEIVE)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has died with unread messages; what it has said before follows
                continue
            except OSError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            descriptor = _descriptor_in(ancillary)
            if flags & socket.MSG_CTRUNC:
                raise PeerGone(
                    f"This process has no room for another file descriptor, so that it cannot receive the memory of an "
                    f"arena. {MORE_ROOM}"
                )
            try:
                version, kind, number, value, length = _HEADER.unpack_from(data)
                text = data[_HEADER.size : _HEADER.size + length].decode("utf-8", "surrogateescape")
                message = Message(Kind(kind), number, value, text, descriptor)
            except (struct.error, ValueError):
                version = -1
            if version != VERSION:
                if descriptor >= 0:
                    os.close(descriptor)
                raise PeerGone(f"{describe(self)} does not speak version {VERSION} of this protocol: use one devguard.")
            yield message

    def stop_receiving(self) -> None:
        """Let the other end's sends fail from now on; what it has sent before can still be received."""
        with contextlib.suppress(OSError):  # the other end is gone
            self.socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket, the pidfd and what is in the outbox."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._outbox.clear()
            if self.pidfd is not None:
                os.close(self.pidfd)
            if self._process == os.getpid():  # a child that was forked may hold a copy, and the end must be seen
                with contextlib.suppress(OSError):  # the other end is gone
                    self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()


def _descriptor_in(ancillary: list[Any]) -> int:
    """Return the one file descriptor that came with a message. Not `socket.recv_fds`, which ignores its flags."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= 4:
            descriptor: int = struct.unpack("=i", data[:4])[0]
            return descriptor
    return -1


def describe(channel: Channel) -> str:
    """Return the process at the other end, for a message."""
    return f"process {channel.pid}" if channel.pid else "a process of another pid namespace"


def listen() -> tuple[socket.socket, str]:
    """Return a listening socket and its address.

    Raises
    ------
    OSError
        There is no room for another descriptor.
    """
    address = _PREFIX + secrets.token_hex(16)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listening.bind("\0" + address)
        listening.listen(128)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening, address


def connect(address: str) -> Channel:
    """Connect to an arena.

    Raises
    ------
    PeerGone
        No arena listens there, or it belongs to another user.
    """
    try:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise PeerGone(f"cannot connect to the arena at {address}: {error}. {MORE_ROOM}") from error
    try:
        end.settimeout(CONNECT_TIMEOUT)
        end.connect("\0" + address)
        channel = Channel(end)
    except ConnectionRefusedError as error:
        end.close()
        raise PeerGone(
            f"No arena listens at {address}. Its process has ended or has closed it, or runs in another network "
            f"namespace (a container), which transport cannot cross."
        ) from error
    except OSError as error:
        end.close()
        raise PeerGone(f"cannot connect to the arena at {address}: {error}") from error
    except BaseException:
        end.close()
        raise
    refusal = refuse_user(channel)
    if not refusal and channel.lacks_descriptor:
        refusal = f"this process has no room for another file descriptor. {MORE_ROOM}"
    if refusal:
        channel.close()
        raise PeerGone(f"The arena at {address}: {refusal}")
    return channel


def refuse_user(channel: Channel) -> str:
    """Return why the process at the other end is refused; empty if it belongs to the same user."""
    if channel.uid == os.geteuid():
        return ""
    return (
        f"{describe(channel)} belongs to user {channel.uid}, this one to user {os.geteuid()}. Tensors go between "
        f"processes of one user only."
    )


def _credentials(end: socket.socket) -> tuple[int, int]:
    pid, uid, _ = struct.unpack("=iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _open_pidfd(end: socket.socket, pid: int) -> int | None:
    """Return a pidfd of the other end's process; None where the kernel has none: then the socket's end has to do.

    Raises
    ------
    OSError
        There is no room for another descriptor.
    """
    try:
        descriptor: int = struct.unpack("=i", end.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
        return descriptor
    except OSError as error:
        if is_full(error):
            raise
    if pid > 0:
        try:
            return os.pidfd_open(pid)
        except (AttributeError, OSError) as error:  # Linux below 5.3, or the process has ended
            if is_full(error):
                raise
    return None
