"""`no_strays`: a block that raises at its end if anything strayed in it."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError
from devguard.reporting import journal
from tests.helpers import tagging
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))


def test_a_block_without_strays_does_not_raise() -> None:
    with devguard.guard("cpu"), devguard.no_strays():
        assert pickle.loads(pickle.dumps(torch.ones(2))).tolist() == [1, 1]
    assert devguard.strays() == ()


def test_a_block_with_repaired_strays_raises_at_its_end() -> None:
    with devguard.guard("cpu"), pytest.raises(StrayDeviceError, match=r"^2 stray\(s\)") as caught, devguard.no_strays():
        for _ in range(2):
            value = pickle.loads(PAYLOAD)
        assert value.tolist() == [0, 1, 2, 3]
    assert __file__ in str(caught.value)
    assert "cuda:3 -> cpu" in str(caught.value)


def test_no_strays_counts_only_what_happens_inside() -> None:
    def stray() -> None:
        pickle.loads(PAYLOAD)

    with devguard.guard("cpu"):
        stray()
        with devguard.no_strays():
            pass
        with pytest.raises(StrayDeviceError, match=r"^1 stray"), devguard.no_strays():
            stray()


def test_no_strays_nests() -> None:
    with devguard.guard("cpu"):
        block = devguard.no_strays()
        with pytest.raises(StrayDeviceError), block:
            with block:
                pass
            with pytest.raises(StrayDeviceError), block:
                pickle.loads(PAYLOAD)


def test_no_strays_does_not_hide_another_exception() -> None:
    with devguard.guard("cpu"), pytest.raises(ZeroDivisionError), devguard.no_strays():
        pickle.loads(PAYLOAD)
        raise ZeroDivisionError


def test_no_strays_reports_the_strays_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.journal, "_max_rows", 0)
    with devguard.guard("cpu"), pytest.raises(StrayDeviceError, match="1 more at call sites"), devguard.no_strays():
        pickle.loads(PAYLOAD)


def test_no_strays_around_a_fork_does_not_raise_in_the_child() -> None:
    program = """
import os, pickle, warnings
warnings.simplefilter("ignore")
import torch, devguard
from devguard.reporting import journal
from tests.helpers import tagging
journal.journal._max_rows = 0  # so that the journal does not keep the parent's stray
devguard.install("repair", "cpu")
pickle.loads(tagging.dumps(torch.ones(2)))
block = devguard.no_strays()
block.__enter__()
pid = os.fork()
if pid == 0:
    block.__exit__(None, None, None)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def stray() -> None:
    with devguard.guard("cpu"):
        pickle.loads(PAYLOAD)


def finish(end: Callable[[], object]) -> str:
    """Return whether the end of a block raises for strays."""
    try:
        end()
    except StrayDeviceError:
        return "raised"
    return "silent"


def as_generator(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    def run() -> Iterator[None]:
        with shared:
            work()
            yield

    generator = run()
    next(generator)
    yield lambda: next(generator, None)


def as_closed_generator(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    def run() -> Iterator[None]:
        with shared:
            work()
            try:
                yield
            except GeneratorExit:
                return

    generator = run()
    next(generator)
    yield generator.close


def as_context_manager(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    @contextlib.contextmanager
    def run() -> Iterator[None]:
        with shared:
            work()
            yield

    manager = run()
    manager.__enter__()
    yield lambda: manager.__exit__(None, None, None)


def as_exit_stack_in_a_generator(
    shared: devguard.no_strays, work: Callable[[], object]
) -> Iterator[Callable[[], object]]:
    def run() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(shared)
            work()
            yield

    generator = run()
    next(generator)
    yield lambda: next(generator, None)


def as_coroutine(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    @types.coroutine
    def pause() -> Iterator[None]:
        yield

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(shared)
            work()
            await pause()

    def end() -> None:
        with contextlib.suppress(StopIteration):
            coroutine.send(None)

    coroutine = run()
    coroutine.send(None)
    yield end


def as_async_generator(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    async def run() -> AsyncIterator[None]:
        with shared:
            work()
            yield

    def step() -> None:
        with contextlib.suppress(StopIteration, StopAsyncIteration):
            generator.__anext__().send(None)

    generator = run()
    step()
    yield step


def as_generator_that_another_thread_ends(
    shared: devguard.no_strays, work: Callable[[], object]
) -> Iterator[Callable[[], object]]:
    (end,) = as_generator(shared, work)
    yield lambda: _on_a_thread(end)


def as_plain_calls(shared: devguard.no_strays, work: Callable[[], object]) -> Iterator[Callable[[], object]]:
    def begin() -> None:
        shared.__enter__()
        work()

    begin()
    yield lambda: shared.__exit__(None, None, None)


def _on_a_thread(function: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


MAKERS = [
    as_generator,
    as_closed_generator,
    as_context_manager,
    as_exit_stack_in_a_generator,
    as_coroutine,
    as_async_generator,
    as_generator_that_another_thread_ends,
    as_plain_calls,
]


class TestOneObjectInSeveralFrames:
    """Each block has an end of its own: that of the frame that entered it."""

    @pytest.mark.parametrize("second", MAKERS)
    @pytest.mark.parametrize("first", MAKERS)
    @pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
    def test_only_the_block_with_the_stray_raises(self, first: Any, second: Any, order: str) -> None:
        if order == "first in, first out" and first is second is as_plain_calls:
            pytest.skip("plain frames cannot take turns")
        shared = devguard.no_strays()
        (end_first,) = first(shared, stray)
        (end_second,) = second(shared, lambda: None)
        ends = {"first": end_first, "second": end_second}
        names = list(ends) if order == "first in, first out" else list(reversed(ends))
        assert {name: finish(ends[name]) for name in names} == {"first": "raised", "second": "silent"}

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    def test_generators_leave_in_any_order(self, order: tuple[int, ...]) -> None:
        shared = devguard.no_strays()
        ends = [end for number in range(4) for end in as_generator(shared, stray if number == 1 else lambda: None)]
        found = {number: finish(ends[number]) for number in order}
        assert found == {0: "raised", 1: "raised", 2: "silent", 3: "silent"}
