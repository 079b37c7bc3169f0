"""The processes of a round: a sender with an arena, a router that opens nothing, and readers."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import time
import traceback
from typing import Any

from devguard import transport
from devguard.transport import reading, server
from tests.chaos import mutants, payloads
from tests.chaos.processes import CHILD_S, Worker, fork_unnoticed


class Sender(Worker):
    """The process with the arena."""

    def __init__(self, end: socket.socket, mutant: str | None) -> None:
        super().__init__(end, mutant)
        mutants.apply(mutant)
        self.arena: transport.Arena | None = None
        self.handles: dict[int, transport.Handle] = {}
        self.dropped: dict[int, float] = {}  # process -> when the parts of its reader were over
        drop = server.Server._drop

        def measured(this: Any, reader: int) -> None:
            channel = this._channels.get(reader)
            drop(this, reader)
            if channel is not None:
                self.dropped.setdefault(channel.pid, time.monotonic())

        server.Server._drop = measured  # type: ignore[method-assign]

    def open(self, budget: int) -> None:
        self.dropped.clear()
        self.arena = transport.Arena("cpu", budget=budget)
        self.tell("opened", self.arena.address)

    def put(self, key: int, nbytes: int, to: Any, how: str, limit: float, send: bool) -> None:
        """Put a payload in a thread; `how` is wait, timeout, now, oversize, async or cancelled."""
        self.start(self._put, key, nbytes, to, how, limit, send)

    def _put(self, key: int, nbytes: int, to: Any, how: str, limit: float, send: bool) -> None:
        arena, value = self.arena, payloads.make(key, nbytes)
        assert arena is not None
        try:
            if how in ("async", "cancelled"):
                handle = asyncio.run(_put_async(arena, value, to, limit if how == "cancelled" else None))
            else:
                handle = arena.put(
                    value,
                    to=to,
                    block=how != "now",
                    timeout=limit if how == "timeout" else None,
                    oversize=how == "oversize",
                )
        except (transport.BudgetFull, asyncio.CancelledError) as error:
            self.tell("put", key, type(error).__name__, 0, b"", str(error))
        except RuntimeError as error:
            self.tell("put", key, type(error).__name__, 0, b"", str(error))
        else:
            payloads.scribble(value)  # it is this process's again
            if not send:
                number = handle.number
                del handle  # it was never pickled, so that it cancels itself
                self.tell("put", key, "discarded", number, b"", "")
                return
            self.handles[key] = handle
            self.tell("put", key, "handle", handle.number, pickle.dumps(handle), "")

    def cancel(self, key: int) -> None:
        self.handles[key].cancel()

    def usage(self) -> None:
        assert self.arena is not None
        usage = self.arena.usage()
        leases = {lease.number: f"{lease.nbytes} bytes, waits for {lease.waits_for}" for lease in usage.leases}
        self.tell("usage", usage.in_use, usage.waiting, leases)

    def fill(self, limit: float) -> None:
        """Put a payload of the whole budget, and cancel it: no byte of the budget is missing."""
        assert self.arena is not None
        try:
            handle = self.arena.put(payloads.make(1, self.arena.budget - 8192), timeout=limit)
        except transport.BudgetFull as error:
            self.tell("filled", str(error))
            return
        handle.cancel()
        self.tell("filled", "")

    def close(self) -> None:
        def close() -> None:
            assert self.arena is not None
            self.arena.close()
            self.tell("closed")

        self.start(close)

    def fork(self, kind: str) -> None:
        """Fork a child that may not use the arena (kind child), or one that Python does not know of (kind raw)."""
        arena, handles = self.arena, list(self.handles.values())
        assert arena is not None
        if kind == "raw":
            self.children.append(fork_unnoticed())
            self.tell("child", self.children[-1])
            return
        child = os.fork()
        if child == 0:
            signal.alarm(CHILD_S)
            status = 1
            try:
                status = _use_forked(arena, handles)
                arena.close()
            finally:
                os._exit(status)
        self.start(self._await_child, child)

    def _await_child(self, child: int) -> None:
        _, status = os.waitpid(child, 0)
        self.tell("forked", status)

    def deaths(self) -> None:
        self.tell("deaths", self.dropped)

    def end_round(self) -> None:
        self.handles.clear()


async def _put_async(arena: transport.Arena, value: Any, to: Any, limit: float | None) -> transport.Handle:
    task = asyncio.ensure_future(arena.put_async(value, to=to))
    if limit is not None:
        await asyncio.sleep(limit)
        task.cancel()
    return await task


class Router(Worker):
    """A process that passes handles on."""

    def route(self, delivery: int, blob: bytes) -> None:
        handle = pickle.loads(blob)
        self.tell("routed", delivery, pickle.dumps(handle))


class Reader(Worker):
    """A process that reads handles."""

    def join(self, address: str, name: str | None) -> None:
        self.start(self._join, address, name)

    def _join(self, address: str, name: str | None) -> None:
        try:
            transport.join(address, name)
        except (transport.PeerGone, transport.HandleReleased) as error:
            self.tell("joined", f"{type(error).__name__}: {error}")
        else:
            self.tell("joined", "")

    def leave(self, address: str) -> None:
        for reader in list(reading._hub.readers.get(address, {}).values()):
            reader.close()

    def read(self, delivery: int, key: int, nbytes: int, blob: bytes, how: str, hold: float) -> None:
        self.start(self._read, delivery, key, nbytes, blob, how, hold)

    def _read(self, delivery: int, key: int, nbytes: int, blob: bytes, how: str, hold: float) -> None:
        handle: transport.Handle = pickle.loads(blob)
        wrong = ""
        try:
            if how == "skip":
                handle.skip()
            elif how in ("get", "twice"):
                wrong = payloads.check(handle.get(), key, nbytes)
                if how == "twice" and not wrong:
                    wrong = _read_again(handle)
            else:
                wrong = self._view(handle, delivery, key, nbytes, how, hold)
        except (transport.HandleReleased, transport.PeerGone) as error:
            outcome, text = type(error).__name__, str(error)
        except ZeroDivisionError:
            outcome, text = "ok", ""
        except Exception:  # noqa: BLE001 - bytes of another payload fail to unpickle in any way
            outcome, text = "wrong", traceback.format_exc()
        else:
            outcome, text = ("wrong", wrong) if wrong else ("ok", "")
        self.tell("read", delivery, outcome, text)

    def _view(self, handle: transport.Handle, delivery: int, key: int, nbytes: int, how: str, hold: float) -> str:
        with handle.view() as value:
            self.tell("inside", delivery)
            wrong = payloads.check(value, key, nbytes)
            until = time.monotonic() + hold
            while not wrong and time.monotonic() < until:
                time.sleep(0.005)
                wrong = payloads.check(value, key, nbytes)
            if how == "fork" and not wrong:
                wrong = _check_in_child(value, key, nbytes)
            elif how == "raw":
                self.children.append(fork_unnoticed())
                self.tell("child", self.children[-1])
            wrong = wrong or payloads.check(value, key, nbytes)
            if how == "scribble":
                payloads.scribble(value)
            elif how == "raise" and not wrong:
                raise ZeroDivisionError
        return wrong


def _use_forked(arena: transport.Arena, handles: list[transport.Handle]) -> int:
    """Use the arena of the parent in a forked child; return 0 if it refuses by name."""
    try:
        arena.put(b"")
        return 2
    except RuntimeError as error:
        if f"belongs to process {os.getppid()}" not in str(error):
            return 3
    try:
        for handle in handles[:1]:
            handle.cancel()
            return 4
    except RuntimeError:
        pass
    return 0


def _read_again(handle: transport.Handle) -> str:
    try:
        handle.get()
    except (transport.HandleReleased, transport.PeerGone):
        return ""
    return f"{handle} was read twice"


def _check_in_child(value: Any, key: int, nbytes: int) -> str:
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_S)
        status = 1
        try:
            status = 1 if payloads.check(value, key, nbytes) else 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return f"the forked child ended with {status}" if status else ""
