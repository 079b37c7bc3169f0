"""The stack of each thread: its entries, its device, and the hooks of the doors."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devguard
from devguard.ownership import stack as stack_module
from devguard.ownership.stack import Stack, changing, local, stacks
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def on_a_thread(function: Callable[[], None]) -> None:
    """Call `function` on a new thread, and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_each_thread_has_a_stack_that_is_listed_while_the_thread_lives() -> None:
    seen: list[bool] = []
    identities: list[int] = []

    def work() -> None:
        seen.append(local.stack is not main and any(each is local.stack for each in stacks()))
        identities.append(id(local.stack))

    main = local.stack
    on_a_thread(work)
    gc.collect()
    assert seen == [True]
    assert any(each is main for each in stacks())
    assert identities[0] not in map(id, stacks())


def test_the_first_device_of_a_thread_is_set_and_later_ones_are_exchanged(cuda: FakeCuda) -> None:
    seen: list[int] = []

    def work() -> None:
        stack = local.stack
        seen.extend([stack.take(1), stack.take(2), stack.give_back(1), cuda.current])

    on_a_thread(work)
    assert seen == [0, 1, 2, 1]
    assert cuda.calls == [("set", 1), ("exchange", 2), ("maybe_exchange", 1)]


def test_the_index_of_the_cpu_moves_no_device(cuda: FakeCuda) -> None:
    seen: list[int] = []
    on_a_thread(lambda: seen.append(local.stack.take(-1)))
    assert seen == [-1]
    assert cuda.calls == []


def test_forget_device_prepares_the_thread_again(cuda: FakeCuda) -> None:
    def work() -> None:
        stack = local.stack
        stack.take(1)
        stack.changes.append("a change")
        stack.forget_device()
        assert stack.changes == []
        stack.take(1)

    on_a_thread(work)
    assert cuda.calls == [("set", 1), ("set", 1)]


def test_pending_changes_are_judged_only_while_moves_are_watched() -> None:
    judged: list[Any] = []

    def judge(stack: Stack, *, leaving: bool = False, failing: bool = False, current: int | None = None) -> None:
        judged.append((stack, leaving, failing, current))

    stack_module.judge_pending(local.stack)
    stack_module.watch_moves(judge)
    try:
        stack_module.judge_pending(local.stack, leaving=True, current=2)
    finally:
        stack_module.unwatch_moves()
    stack_module.judge_pending(local.stack)
    assert judged == [(local.stack, True, False, 2)]


@pytest.fixture
def inherited() -> Iterator[list[Stack]]:
    """The stacks for which ``inherit`` is called."""
    seen: list[Stack] = []
    stack_module.inherit_with(seen.append)
    yield seen
    stack_module.inherit_with(None)


def test_a_new_stack_inherits_when_it_is_first_used(inherited: list[Stack]) -> None:
    used: list[Stack] = []
    on_a_thread(lambda: None)
    assert inherited == []
    on_a_thread(lambda: used.append(local.stack))
    assert [id(stack) for stack in inherited] == [id(stack) for stack in used]


def test_only_stacks_with_changes_are_marked() -> None:
    stack = local.stack
    stack.changes.append("a change")
    stack_module.mark_changes(stack)
    assert id(stack) in changing
    stack.changes.clear()  # by code that does not mark it
    changing.add(-1)  # a thread that has ended
    stack_module.look_for_changes()
    assert not changing & {id(stack), -1}


def test_an_entry_lies_on_the_stack_while_its_scope_is_entered() -> None:
    scope = devguard.guard("cpu")
    with scope:
        ((entered, owner, taken),) = local.stack
    assert (entered, str(owner), taken) == (scope, "<owner cpu>", -1)
    assert not local.stack
