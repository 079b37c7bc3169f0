"""Greenlets of one thread: each keeps its scopes and its current device."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import greenlet
import pytest
import torch

import devguard
from devguard.ownership import greenlets
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def where(cuda: FakeCuda) -> tuple[int, str]:
    return cuda.current, str(devguard.owner())


def take_turns(*bodies: Callable[[], Any]) -> None:
    """Run the bodies as greenlets in turn, each from one `pause` to the next."""
    running = [greenlet.greenlet(body) for body in bodies]
    while any(not one.dead for one in running):
        for one in running:
            if not one.dead:
                one.switch()


def pause() -> None:
    parent = greenlet.getcurrent().parent
    assert parent is not None
    parent.switch()


SCOPES = {
    "guard": (lambda index: devguard.guard(index)),
    "remap": (lambda index: devguard.remap(index)),
    "observing guard": (lambda index: devguard.guard(f"cuda:{index}", mode="observe")),
}


@pytest.mark.parametrize("make", SCOPES.values(), ids=SCOPES)
def test_each_greenlet_keeps_its_scope_and_device(cuda: FakeCuda, make: Callable[[int], Any]) -> None:
    with devguard.guard(7):
        pass

    def body(index: int) -> Callable[[], None]:
        def run() -> None:
            pause()
            assert where(cuda) == (5, "None")
            with make(index):
                for _ in range(3):
                    pause()
                    assert where(cuda) == (index, f"cuda:{index}")
                cuda.exchange(6)
                pause()
                assert where(cuda) == (6, f"cuda:{index}")
            assert where(cuda) == (5, "None")

        return run

    torch.cuda.set_device(5)
    take_turns(body(1), body(2), body(3))
    assert where(cuda) == (5, "None")
    assert not local.stack


@pytest.mark.parametrize("scope", [devguard.guard("cpu"), devguard.unguarded()], ids=repr)
def test_scopes_that_take_no_device_are_a_greenlets_own_too(cuda: FakeCuda, scope: Any) -> None:
    devguard.install("cuda:2")
    inside = "cpu" if isinstance(scope, devguard.guard) else "None"
    seen: list[str] = []

    def held() -> None:
        with scope:
            pause()
            seen.append(str(devguard.owner()))

    take_turns(held, lambda: seen.append(str(devguard.owner())))
    assert seen == ["cuda:2", inside]
    assert str(devguard.owner()) == "cuda:2"


@pytest.mark.parametrize("first", [lambda: devguard.guard(2), devguard.owner, devguard.unguarded])
def test_a_thread_keeps_the_scopes_that_a_greenlet_in_it_asks_for_first(
    cuda: FakeCuda, first: Callable[[], Any]
) -> None:
    seen: list[str] = []

    def inner() -> None:
        scope = first()
        if hasattr(scope, "__enter__"):
            with scope:
                pause()
        else:
            pause()

    def work() -> None:
        take_turns(inner)
        seen.append(str(devguard.owner()))

    with devguard.guard(1):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["cuda:1"]


def test_a_greenlet_that_starts_inside_a_scope_is_outside_of_it(cuda: FakeCuda) -> None:
    seen = []
    torch.cuda.set_device(4)
    with devguard.guard(1):
        one = greenlet.greenlet(lambda: seen.append(where(cuda)))
        one.switch()
        assert where(cuda) == (1, "cuda:1")
    assert seen == [(4, "None")]


def test_an_exception_that_is_thrown_into_a_greenlet_arrives_in_its_scope(cuda: FakeCuda) -> None:
    seen = []

    def run() -> None:
        with devguard.guard(2):
            try:
                pause()
            except ValueError:
                seen.append(where(cuda))

    with devguard.guard(1):
        one = greenlet.greenlet(run)
        one.switch()
        one.throw(ValueError())
        assert where(cuda) == (1, "cuda:1")
    assert seen == [(2, "cuda:2")]


def test_the_trace_function_of_the_program_is_called_and_put_back(cuda: FakeCuda) -> None:
    events: list[str] = []

    def trace(event: str, args: Any) -> None:
        events.append(event)

    before = greenlet.settrace(trace)
    try:
        with devguard.guard(1):
            greenlet.greenlet(lambda: None).switch()
        assert events == ["switch", "switch"]
        devguard.uninstall()
        assert greenlet.gettrace() is trace
    finally:
        greenlet.settrace(before)


def test_uninstall_stops_the_watch(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        assert isinstance(greenlet.gettrace(), greenlets.Watch)
    devguard.uninstall()
    assert greenlet.gettrace() is None


def test_a_device_that_cannot_be_read_is_told_and_breaks_no_greenlet(
    cuda: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    with devguard.guard(1):
        watch = greenlet.gettrace()
        watch.exchange = object()  # type: ignore[union-attr]
        done: list[int] = []
        greenlet.greenlet(lambda: done.append(1)).switch()
    assert done == [1]
    assert "no longer keeps greenlets of this thread apart" in capfd.readouterr().err


@pytest.mark.parametrize("switches", [0, 2])
def test_a_thread_that_ends_leaves_no_watch_and_no_stack(cuda: FakeCuda, switches: int) -> None:
    ended = []

    def work() -> None:
        with devguard.guard(1):
            ended.append(weakref.ref(local.stack))
            for _ in range(switches):
                greenlet.greenlet(lambda: None).switch()

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    deadline = time.monotonic() + 20
    while any(stack() is not None for stack in ended):
        assert time.monotonic() < deadline, f"{sum(stack() is not None for stack in ended)} of {len(ended)} are left"
        # greenlet clears the state of an ended thread when it can, on a busy machine only with that of the next one.
        thread = threading.Thread(target=greenlet.getcurrent)
        thread.start()
        thread.join()
        gc.collect()
