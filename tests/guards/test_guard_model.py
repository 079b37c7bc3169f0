"""Scopes against a model: any order of scopes, generators, coroutines, threads, device changes, errors and interrupts.

The model is the rule "the current device and the owner belong to the frame": code finds both as it left them, whatever
ran between two of its steps. ``pytest --hypothesis-profile=long tests/guards/test_guard_model.py`` tries 10,000
programs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import devguard
from devguard.ownership.stack import local
from devguard.support import accelerator
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda

DEVICES = st.integers(0, 3)
Command = tuple[str, Any]
HOISTED = {index: devguard.guard(index) for index in range(4)}  # one object that all frames and threads share


def make_scope(kind: str, index: int) -> Any:
    return {
        "fresh": lambda: devguard.guard(index),
        "by name": lambda: devguard.guard(f"cuda:{index}"),
        "hoisted": lambda: HOISTED[index],
        "remap": lambda: devguard.remap(index),
        "cpu": lambda: devguard.guard("cpu"),
        "unguarded": devguard.unguarded,
    }[kind]()


KINDS = st.sampled_from(["fresh", "by name", "hoisted", "remap", "cpu", "unguarded"])


class device_block:
    """As ``torch.cuda.device``: makes a device current by calls that no door watches, and restores the one before."""

    def __init__(self, cuda: FakeCuda, index: int) -> None:
        self.cuda, self.index = cuda, index

    def __enter__(self) -> None:
        self.before = self.cuda.exchange(self.index)

    def __exit__(self, *error: object) -> None:
        self.cuda.maybe_exchange(self.before)


class Modelled:
    """What the model knows of one frame, or of one thread outside every frame: its blocks and its device."""

    def __init__(self, kind: str | None = None, index: int = 0) -> None:
        self.kind = kind
        self.index = index
        self.blocks: list[tuple[str, int, int]] = []  # kind, index, the device before
        self.own: int | None = None  # of a suspended frame: a device that differs from its scope's

    @property
    def takes(self) -> bool:
        return self.kind not in (None, "cpu", "unguarded")

    def owner(self) -> str:
        scopes = [(kind, index) for kind, index, _ in self.blocks if kind != "device"]
        if self.kind is not None:
            scopes.insert(0, (self.kind, self.index))
        if not scopes:
            return "None"
        kind, index = scopes[-1]
        return {"cpu": "cpu", "unguarded": "None"}.get(kind, f"cuda:{index}")

    def run(self, command: Command, device: int) -> int:
        """Return the device that is current after the command."""
        what, value = command
        if what == "enter":
            kind, index = value
            self.blocks.append((kind, index, device))
            return device if kind in ("cpu", "unguarded") else index
        if what == "leave":
            kind, _, before = self.blocks.pop()
            return device if kind in ("cpu", "unguarded") else before
        if what in ("set_device", "move"):
            return int(value)
        return device

    def step(self, command: Command, outside: int) -> tuple[int, str]:
        """Return what a suspended frame sees after one command, resumed where `outside` is current."""
        current = self.own if self.own is not None else self.index if self.takes else outside
        if not self.takes:
            for position, (kind, index, _) in enumerate(self.blocks):
                if kind not in ("cpu", "unguarded", "device"):
                    self.blocks[position] = (kind, index, outside)
                    break
        current = self.run(command, current)
        seen = (current, self.owner())
        holds = any(kind != "device" for kind, _, _ in self.blocks)
        differs = current != (self.index if self.takes else outside)
        self.own = current if differs or (holds and not self.takes) else None
        return seen


def interpret(cuda: FakeCuda) -> Generator[Any, Command, None]:
    """The frame under test: it does what it is sent, and yields what it sees."""
    blocks: list[Any] = []
    seen: Any = None
    while True:
        what, value = yield seen
        if what == "enter":
            kind, index = value
            blocks.append(device_block(cuda, index) if kind == "device" else make_scope(kind, index))
            blocks[-1].__enter__()
        elif what == "leave":
            error = {None: None, "error": ValueError(), "interrupt": KeyboardInterrupt()}[value]
            block = blocks.pop()
            block.__exit__(None if error is None else type(error), error, None)
        elif what == "set_device":
            torch.cuda.set_device(value)
        elif what == "move":
            cuda.exchange(value)
        seen = (cuda.current, str(devguard.owner()))


class Sent:
    """An awaitable that hands a value out of a coroutine, and a command in."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self.value)


async def interpret_async(cuda: FakeCuda) -> None:
    body = interpret(cuda)
    seen = next(body)
    while True:
        seen = body.send(await Sent(seen))


async def interpret_items(cuda: FakeCuda) -> Any:
    body = interpret(cuda)
    seen = next(body)
    while True:
        seen = body.send((yield seen))


def finish(awaitable: Any) -> Any:
    """Run an awaitable that waits for nothing."""
    try:
        awaitable.__await__().send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


class Frame:
    """A decorated generator, coroutine or asynchronous generator that waits for commands."""

    def __init__(self, cuda: FakeCuda, how: str, kind: str, index: int) -> None:
        self.model = Modelled(kind, index)
        scope = make_scope(kind, index)
        self.send: Callable[[Any], Any]
        if how == "asynchronous generator":
            items = scope(interpret_items)(cuda)
            self.send = lambda command: finish(items.asend(command))
            self.close = lambda: finish(items.aclose())
        else:
            body = scope(interpret)(cuda) if how == "generator" else self._coroutine(scope, how, cuda)
            self.send, self.close = body.send, body.close
        self.send(None)

    @staticmethod
    def _coroutine(scope: Any, how: str, cuda: FakeCuda) -> Any:
        return scope(interpret_async)(cuda) if how == "coroutine" else scope.run(interpret_async(cuda))


class Worker:
    """A thread that steps frames, and code of its own."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.model = Modelled()
        self.device = 0
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.body = self.call(lambda: interpret(cuda))
        self.call(lambda: next(self.body))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._done.put(work())
            except BaseException as error:  # noqa: BLE001 - for the caller
                self._done.put(error)

    def call(self, work: Callable[[], Any]) -> Any:
        self._work.put(work)
        result = self._done.get(timeout=30)
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join()


class Scopes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.context = contextlib.ExitStack()
        fresh = contextlib.contextmanager(tagging.fresh)
        self.context.enter_context(fresh())
        self.cuda = self.context.enter_context(FakeCuda(4).installed())
        # As on a GPU, where every call that moves the device initialises CUDA.
        self.context.enter_context(mock.patch.object(accelerator, "is_initialized", return_value=True))
        self.workers = [Worker(self.cuda), Worker(self.cuda)]
        self.frames: list[Frame] = []

    def teardown(self) -> None:
        for frame in self.frames:
            self.workers[0].call(frame.close)
        for worker in self.workers:
            worker.stop()
        self.context.close()

    def _here(self, worker: Worker, command: Command) -> None:
        worker.device = worker.model.run(command, worker.device)
        assert worker.call(lambda: worker.body.send(command)) == (worker.device, worker.model.owner())

    def _in_frame(self, worker: Worker, frame: Frame, command: Command) -> None:
        expected = frame.model.step(command, worker.device)
        assert worker.call(lambda: frame.send(command)) == expected

    @rule(data=st.data(), how=st.sampled_from(["generator", "coroutine", "run", "asynchronous generator"]))
    def begin(self, data: st.DataObject, how: str) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        kind, index = data.draw(KINDS), data.draw(DEVICES)
        self.frames.append(worker.call(lambda: Frame(self.cuda, how, kind, index)))

    def _draw_place(self, data: st.DataObject) -> tuple[Worker, Frame | None, Modelled]:
        worker = data.draw(st.sampled_from(self.workers))
        frame = data.draw(st.sampled_from([None, *self.frames]))
        return worker, frame, worker.model if frame is None else frame.model

    def _do(self, worker: Worker, frame: Frame | None, command: Command) -> None:
        if frame is None:
            self._here(worker, command)
        else:
            self._in_frame(worker, frame, command)

    @rule(data=st.data(), kind=st.one_of(KINDS, st.just("device")), index=DEVICES)
    def enter(self, data: st.DataObject, kind: str, index: int) -> None:
        worker, frame, _ = self._draw_place(data)
        self._do(worker, frame, ("enter", (kind, index)))

    @rule(data=st.data(), how=st.sampled_from([None, "error", "interrupt"]))
    def leave(self, data: st.DataObject, how: str | None) -> None:
        worker, frame, model = self._draw_place(data)
        if model.blocks:
            self._do(worker, frame, ("leave", how))

    @rule(data=st.data(), what=st.sampled_from(["set_device", "move", "look"]), index=DEVICES)
    def move(self, data: st.DataObject, what: str, index: int) -> None:
        worker, frame, _ = self._draw_place(data)
        self._do(worker, frame, (what, index))

    @precondition(lambda self: any(w.model.blocks and w.model.blocks[-1][0] == "unguarded" for w in self.workers))
    @rule(error=st.sampled_from([RecursionError, KeyboardInterrupt, RuntimeError]))
    def interrupt(self, error: type[BaseException]) -> None:
        """Let the query at the end of ``unguarded`` fail: the scope must have been left by then."""
        worker = next(w for w in self.workers if w.model.blocks and w.model.blocks[-1][0] == "unguarded")
        worker.model.blocks.pop()
        blocks = worker.body.gi_frame.f_locals["blocks"]

        def leave() -> None:
            with mock.patch.object(accelerator, "contexts", side_effect=error), contextlib.suppress(error):
                blocks.pop().__exit__(None, None, None)

        worker.call(leave)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        worker, frame, _ = self._draw_place(data)
        if frame is not None and not frame.model.blocks:
            self.frames.remove(frame)
            worker.call(frame.close)

    @invariant()
    def frames_leave_no_trace(self) -> None:
        for worker in self.workers:
            seen = worker.call(lambda: (self.cuda.current, str(devguard.owner()), len(local.stack)))
            scopes = [kind for kind, _, _ in worker.model.blocks if kind != "device"]
            assert seen == (worker.device, worker.model.owner(), len(scopes))


TestScopes = Scopes.TestCase
TestScopes.settings = settings(suppress_health_check=list(HealthCheck), stateful_step_count=30)
TestScopes = pytest.mark.usefixtures("clean")(TestScopes)
