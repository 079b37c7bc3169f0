"""The stack in a child that is forked after CUDA was initialised: torch's own functions raise there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import guard, unguarded


def code_of_child(work: Callable[[], Any]) -> int:
    """Call `work` in a forked child; return the child's exit status, 0 unless it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the status says so
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def enter(scope: Any) -> None:
    with scope:
        pass


async def step() -> None:
    await asyncio.sleep(0)


@guard("cpu")
def generator() -> Iterator[int]:
    yield 1
    yield 2


def submit() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: 1).result() == 1


def start() -> None:
    thread = threading.Thread(target=enter, args=(guard("cpu"),))
    thread.start()
    thread.join()


def within(scope: Any, work: Callable[[], Any]) -> None:
    with scope:
        work()


WORK: dict[str, Callable[[], Any]] = {
    "cpu": lambda: enter(guard("cpu")),
    "nested": lambda: within(guard("cpu"), lambda: enter(guard("cpu"))),
    "unguarded": lambda: enter(unguarded()),
    "coroutine": lambda: asyncio.run(guard("cpu").run(step())),
    "generator": lambda: list(generator()),
    "pool": submit,
    "pool of a scope": lambda: within(guard("cpu"), submit),
    "thread": start,
    "no_strays": lambda: enter(devguard.no_strays()),
    "status": devguard.status,
    "uninstall": devguard.uninstall,
}


@pytest.fixture(autouse=True)
def _has_taken_a_device() -> None:
    with guard(1):
        torch.empty(1, device="cuda")


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
class TestForkedChild:
    def test_work_without_a_gpu_goes_on_outside_every_scope(self, work):
        assert code_of_child(work) == 0

    def test_work_without_a_gpu_goes_on_inside_the_parents_scopes(self, work):
        with guard(1), guard(2):
            assert code_of_child(work) == 0
            assert torch.cuda.current_device() == 2

    def test_a_child_leaves_the_parents_scopes(self, work):
        pid = -1
        try:
            with guard(2), guard(1):
                pid = os.fork()
            if pid == 0:
                work()
                os._exit(0)
        except BaseException:
            if pid == 0:
                traceback.print_exc()
                os._exit(1)
            raise
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert torch.cuda.current_device() == 0


def test_a_guard_of_a_gpu_raises_torchs_own_error_in_a_forked_child():
    def take() -> None:
        with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
            guard(1).__enter__()
        assert devguard.owner() is None

    assert code_of_child(take) == 0


def test_the_parent_keeps_its_devices():
    with guard(2):
        with guard(1):
            assert code_of_child(lambda: None) == 0
            assert torch.cuda.current_device() == 1
        assert torch.cuda.current_device() == 2
    assert torch.cuda.current_device() == 0
