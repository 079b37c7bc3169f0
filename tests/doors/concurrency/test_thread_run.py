"""How a thread or a task runs with what it took over."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

import devguard
from devguard.doors.concurrency import thread_plan, thread_run
from devguard.doors.concurrency.thread_plan import Start
from devguard.ownership.owner import owner_of_index
from devguard.ownership.stack import Entry, Stack, local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def entry(index: int) -> Entry:
    return devguard.guard(index), owner_of_index(index), -1


def test_a_task_enters_its_scopes_and_leaves_the_device_of_its_worker(cuda: FakeCuda) -> None:
    torch.cuda.set_device(3)
    left = thread_run.enter(Start((entry(1), entry(2)), 2))
    assert (cuda.current, str(devguard.owner())) == (2, "cuda:2")
    assert len(local.stack) == 2
    thread_run.leave(left)
    assert (cuda.current, devguard.owner()) == (3, None)


def test_leaving_a_task_also_leaves_the_scopes_that_it_did_not_leave(cuda: FakeCuda) -> None:
    with devguard.guard(3):
        left = thread_run.enter(Start((entry(1),), 1))
        devguard.guard(2).__enter__()
        thread_run.leave(left)
        assert (cuda.current, str(devguard.owner())) == (3, "cuda:3")


def test_a_task_whose_device_cannot_be_set_enters_no_scope(cuda: FakeCuda) -> None:
    def fail(index: int) -> int:
        raise LookupError(index)

    local.stack.take = fail
    with pytest.raises(LookupError):
        thread_run.enter(Start((entry(1),), 1))
    assert not local.stack


def test_a_function_is_called_as_its_thread_ends() -> None:
    seen: list[Any] = []

    def end() -> None:
        seen.append(threading.current_thread() is thread)

    def work() -> None:
        thread_run.call_at_end(thread, end)
        seen.append("work")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    thread_run.call_forgotten(thread)
    assert seen == ["work", True]
    assert "_delete" not in vars(thread)


def test_a_thread_is_running_between_its_start_and_its_end() -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(thread_run.is_running(thread)))
    seen.append(thread_run.is_running(thread))
    thread.start()
    thread.join()
    seen.append(thread_run.is_running(thread))
    assert seen == [False, True, False]
    assert thread_run.is_running(threading.current_thread())


def test_a_thread_inherits_the_scopes_of_its_plan(cuda: FakeCuda) -> None:
    seen: list[Any] = []

    def work() -> None:
        stack = Stack()
        thread_run.inherit(stack)
        seen.append([owner and owner.tag for _, owner, _ in stack])

    thread = threading.Thread(target=work)
    thread_plan.planned[id(thread)] = Start((entry(1), entry(2)), 2)
    try:
        for each in (thread, threading.Thread(target=work)):
            each.start()
            each.join()
    finally:
        del thread_plan.planned[id(thread)]
    assert seen == [["cuda:1", "cuda:2"], []]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_forgets_the_plans_of_other_threads() -> None:
    own = id(threading.current_thread())
    thread_plan.planned.update({own: Start((), -1), -1: Start((), -1)})
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(thread_plan.planned.keys() != {own})
        assert os.waitpid(pid, 0)[1] == 0
        assert -1 in thread_plan.planned
    finally:
        del thread_plan.planned[own], thread_plan.planned[-1]
