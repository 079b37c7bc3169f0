"""Processes that put and read handles at a test's word. They import no torch, so that they start quickly."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from devguard import transport

ANSWER_S = 30.0


class Peer:
    """A process that does what it is told; what it raises is raised here."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def join(self, address: str, name: str | None) -> None:
        """Connect to an arena."""
        self.ask("join", address, name)

    def get(self, handle: transport.Handle) -> Any:
        """Read a handle."""
        return self.ask("get", handle)

    def hold(self, handle: transport.Handle) -> Any:
        """Enter the view of a handle, for good."""
        return self.ask("hold", handle)

    def make_arena(self, budget: int) -> str:
        """Make an arena; return its address."""
        return str(self.ask("make_arena", budget))

    def put(self, value: Any, to: Any) -> Any:
        """Put an object into the arena of the process; return the handle."""
        return self.ask("put", value, to)

    def is_connected(self, address: str) -> bool:
        """Return whether the process is a reader of an arena, or can become one."""
        try:
            self.join(address, None)
        except transport.PeerGone:
            return False
        return True

    def post(self, name: str, *arguments: Any) -> None:
        """Let the process do something; `answer` returns the result."""
        self._link.send((name, *arguments))

    def ask(self, name: str, *arguments: Any) -> Any:
        """Let the process do something, and return its result."""
        self.post(name, *arguments)
        return self.answer()

    def answer(self) -> Any:
        """Return the next result."""
        assert self._link.poll(ANSWER_S), "the process does not answer"
        done, value = self._link.recv()
        if not done:
            raise value
        return value

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self.process.kill()
        self.process.join()
        self._link.close()


def _serve(link: Connection) -> None:
    state = _State()
    while True:
        name, *arguments = link.recv()
        try:
            answer = True, getattr(state, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            answer = False, error
        link.send(answer)


class _State:
    """What the process has open."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._arena: transport.Arena | None = None

    def join(self, address: str, name: str | None) -> None:
        transport.join(address, name)

    def get(self, handle: transport.Handle) -> Any:
        return handle.get()

    def get_ends(self, handle: transport.Handle) -> tuple[int, int, int]:
        value = handle.get()
        return len(value), value[0], value[-1]

    def hold(self, handle: transport.Handle) -> Any:
        return self._held.enter_context(handle.view())

    def make_arena(self, budget: int) -> str:
        self._arena = transport.Arena("cpu", budget=budget)
        return self._arena.address

    def put(self, value: Any, to: Any) -> transport.Handle:
        assert self._arena is not None
        return self._arena.put(value, to=to)
