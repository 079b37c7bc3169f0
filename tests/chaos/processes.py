"""Processes that answer requests, and what they hold.

Each is forked from the chaos, which has no threads, and has one socket to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import re
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from devguard.transport import reading

LARGEST = 1 << 18  # bytes of a message
CHILD_S = 5  # seconds that a forked child may live
_PR_SET_PDEATHSIG = 1
_libc = ctypes.PyDLL(None)  # it keeps the GIL, so that a child of `_libc.fork` has it


class Process:
    """One process of a round, as the chaos sees it."""

    def __init__(self, role: type[Worker], mutant: str | None) -> None:
        self.role = role.__name__.lower()
        self.end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.setblocking(False)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(role, theirs, mutant)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self.outbox: list[bytes] = []
        self.is_alive, self.is_stopped = True, False

    def send(self, *message: Any) -> None:
        """Send a request; what a stopped process does not take waits in the outbox."""
        if self.is_alive:
            self.outbox.append(pickle.dumps(message))
            self.flush()

    def flush(self) -> None:
        """Send what is in the outbox."""
        with contextlib.suppress(BlockingIOError):
            while self.outbox:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.end.send(self.outbox[0])
                del self.outbox[0]

    def receive(self) -> Any:
        """Return the next answer, None if there is none now.

        Raises
        ------
        EOFError
            The process has ended.
        """
        try:
            data = self.end.recv(LARGEST)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # it has died with unread requests; its answers follow
            return self.receive()
        if not data:
            raise EOFError
        return pickle.loads(data)

    def forget(self) -> None:
        """Close what belongs to a process that has ended."""
        self.is_alive = False
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.end.close()


def _become(role: type[Worker], end: socket.socket, mutant: str | None) -> NoReturn:
    status = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.closerange(3, end.fileno())
        os.closerange(end.fileno() + 1, 1024)
        faulthandler.register(signal.SIGUSR1)
        role(end, mutant).run()
        status = 0
    except BaseException:  # noqa: BLE001 - the child may not return into the chaos
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class Worker:
    """A process that answers requests."""

    def __init__(self, end: socket.socket, mutant: str | None) -> None:
        self.end = end
        self.sending = threading.Lock()
        self.children: list[int] = []  # those that Python does not know of
        self.before = Counted()

    def run(self) -> None:
        """Serve until the chaos has ended."""
        while data := self.end.recv(LARGEST):
            name, *arguments = pickle.loads(data)
            getattr(self, name)(*arguments)

    def tell(self, *message: Any) -> None:
        with self.sending:
            self.end.send(pickle.dumps(message))

    def start(self, function: Any, *arguments: Any) -> None:
        def run() -> None:
            try:
                function(*arguments)
            except BaseException:  # noqa: BLE001 - it is told
                self.tell("fault", f"{function.__name__}{arguments[:2]}: {traceback.format_exc()}")

        threading.Thread(target=run, name="work", daemon=True).start()

    def snapshot(self) -> None:
        """Tell what this process holds that it did not hold at its start."""
        self.children = [child for child in self.children if os.waitpid(child, os.WNOHANG)[0] == 0]
        self.tell("snapshot", Counted().beyond(self.before))


class Counted:
    """What a process holds: descriptors, maps of arenas, and threads."""

    def __init__(self) -> None:
        self.descriptors: dict[int, str] = {}
        hub = reading._hub
        own = {hub._wake, hub._selector.fileno()} if isinstance(hub._selector, object) and hub._selector else set()
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if number not in own:
                    self.descriptors[number] = os.readlink(f"/proc/self/fd/{number}")
        with open("/proc/self/maps") as file:
            self.maps = sum("devguard-transport" in line for line in file)
        self.threads = sorted(
            thread.name for thread in threading.enumerate() if thread.name in ("work", "devguard-arena")
        )
        self.descriptors = {
            number: target for number, target in self.descriptors.items() if not re.search(r"/fd$", target)
        }

    def beyond(self, other: Counted) -> list[str]:
        """Return what is here and not there."""
        more = [f"descriptor {number}: {target}" for number, target in self.descriptors.items()
                if number not in other.descriptors]  # fmt: skip
        more += [f"map {number} of an arena" for number in range(self.maps - other.maps)]
        return more + [f"thread {name}" for name in self.threads]


def fork_unnoticed() -> int:
    """Fork a child as a C library does: it keeps all descriptors and maps open, and does nothing."""
    child: int = _libc.fork()
    if child == 0:
        signal.alarm(CHILD_S)
        while True:
            _libc.pause()
    return child
