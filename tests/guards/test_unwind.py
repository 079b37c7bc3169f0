"""Scopes that are left out of order or on another thread."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import devguard
from devguard.doors import table
from devguard.guards import base, unwind
from devguard.ownership import stack as stack_module
from devguard.ownership.stack import local
from devguard.support import accelerator
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def misuse() -> Iterator[None]:
    unwind._reported.clear()
    yield
    unwind._reported.clear()


@pytest.mark.usefixtures("misuse")
def test_a_scope_left_out_of_order_is_reported_at_the_users_line(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match=r"held across an await or a yield.*run\(awaitable\)") as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        first.__exit__(None, None, None)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert cuda.current == 2
    assert devguard.owner() == torch.device("cuda:2")
    second.__exit__(None, None, None)
    assert cuda.current == 0
    assert devguard.owner() is None


@pytest.mark.usefixtures("misuse")
def test_a_report_that_filters_make_an_error_is_printed_and_the_exit_succeeds(
    cuda: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
    first.__enter__()
    second.__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.__exit__(None, None, None)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{__file__}:")
    assert "held across an await" in err
    second.__exit__(None, None, None)
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
def test_a_scope_without_a_device_may_lie_between_those_left_out_of_order(cuda: FakeCuda) -> None:
    torch.cuda.set_device(3)
    first, between, second = devguard.guard("cuda:1"), devguard.guard("cpu"), devguard.guard("cuda:2")
    for each in (first, between, second):
        each.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    between.__exit__(None, None, None)
    assert cuda.current == 3


@pytest.mark.usefixtures("misuse")
def test_the_device_is_restored_when_the_remaining_scopes_took_none(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.unguarded()
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    assert cuda.current == 0
    second.__exit__(None, None, None)
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("scoped", [devguard.guard("cuda:1"), devguard.unguarded()], ids=repr)
def test_a_scope_left_on_another_thread_is_reported_there(cuda: FakeCuda, scoped: Any) -> None:
    caught: list[warnings.WarningMessage] = []
    entered = threading.Event()

    def leave() -> None:
        entered.wait()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scoped.__exit__(None, None, None)
        caught.extend(seen)

    thread = threading.Thread(target=leave)
    thread.start()  # before the scope is entered, so that the thread inherits nothing
    scoped.__enter__()
    entered.set()
    thread.join()
    assert [(one.category, one.filename) for one in caught] == [(RuntimeWarning, __file__)]
    assert "thread that had not entered it" in str(caught[0].message)
    scoped.__exit__(None, None, None)
    assert devguard.owner() is None
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
def test_misuse_is_reported_once_per_call_site(cuda: FakeCuda) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)
    assert len(caught) == 1
    assert cuda.current == 0


# --- an entry is an entry: one object that several frames enter ---

hoisted = devguard.guard("cuda:1")
SHARED: dict[str, Callable[[], Any]] = {
    "an index": lambda: devguard.guard(1),
    "a name": lambda: devguard.guard("cuda:1"),
    "one object": lambda: hoisted,
    "unguarded": devguard.unguarded,
}


def hold(make: Callable[[], Any]) -> Iterator[None]:
    with make():
        yield


def hold_on_a_stack(make: Callable[[], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(make())
        yield


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("holds", [hold, hold_on_a_stack])
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_an_exit_takes_the_entry_of_its_own_frame(
    cuda: FakeCuda, make: Callable[[], Any], holds: Callable[[Callable[[], Any]], Iterator[None]]
) -> None:
    first, second = holds(make), holds(make)
    next(first)
    next(second)
    entries = list(local.stack)
    with pytest.warns(RuntimeWarning, match="held across"):
        assert next(first, "done") == "done"
    assert [entry[0] for entry in local.stack] == [entries[1][0]]
    assert next(second, "done") == "done"
    assert not local.stack
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_a_generator_does_not_take_the_entry_of_the_block_that_resumes_it(
    cuda: FakeCuda, make: Callable[[], Any]
) -> None:
    held = hold(make)
    next(held)
    with make():
        inner = local.stack[-1]
        with pytest.warns(RuntimeWarning, match="held across"):
            assert next(held, "done") == "done"
        assert local.stack[-1][0] is inner[0]
        assert len(local.stack) == 1
    assert not local.stack
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_recursion_and_nesting_of_one_object_are_in_order(cuda: FakeCuda, make: Callable[[], Any]) -> None:
    def recurse(depth: int) -> None:
        with make(), contextlib.ExitStack() as stack:
            stack.enter_context(make())
            if depth:
                recurse(depth - 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recurse(3)
        with make():
            list(hold(make))
            list(hold_on_a_stack(make))
    assert not local.stack
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("make", [SHARED["an index"], SHARED["a name"]])
def test_a_generator_that_ends_on_another_thread_leaves_that_threads_entry_alone(
    cuda: FakeCuda, make: Callable[[], Any]
) -> None:
    held = hold(make)
    next(held)
    caught: list[str] = []

    def end() -> None:
        with devguard.unguarded(), make():
            own = local.stack[-1]
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                next(held, None)
            caught.extend(str(one.message) for one in seen)
            assert local.stack[-1] is own
            assert cuda.current == 1

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert "thread that had not entered it" in caught[0]
    local.stack.clear()
    torch.cuda.set_device(0)


# --- undo first ---


@pytest.mark.parametrize("error", [RecursionError, KeyboardInterrupt, MemoryError, RuntimeError])
def test_unguarded_is_left_before_anything_that_can_fail(cuda: FakeCuda, error: type[BaseException]) -> None:
    with devguard.guard(1):
        with (
            contextlib.suppress(error),
            mock.patch.object(accelerator, "contexts", side_effect=error),
            devguard.unguarded(),
        ):
            pass
        assert devguard.owner() == torch.device("cuda:1")
        assert len(local.stack) == 1


@pytest.mark.parametrize("error", [RecursionError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("scoped", [devguard.guard(1), devguard.guard(1).__call__], ids=["block", "decorated"])
def test_a_guard_is_left_before_changes_are_judged(cuda: FakeCuda, error: type[BaseException], scoped: Any) -> None:
    def body() -> None:
        torch.cuda.set_device(2)
        local.stack.changes.append("pending")

    def fail(*_: object, **__: object) -> None:
        raise error

    with devguard.guard(3):
        stack_module.watch_moves(fail)
        with contextlib.suppress(error):
            if isinstance(scoped, devguard.guard):
                with scoped:
                    body()
            else:
                scoped(body)()
        assert cuda.current == 3
        assert len(local.stack) == 1
        local.stack.changes.clear()


class Unprintable:
    """A callable whose representation fails."""

    def __call__(self) -> str:
        return "result"

    def __repr__(self) -> str:
        raise RuntimeError("no representation")


def test_a_failure_of_ours_does_not_lose_the_result_of_a_call(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._inspection, "_last", float("-inf"))
    assert devguard.guard(1)(Unprintable())() == "result"
    monkeypatch.setattr(base._inspection, "_last", float("-inf"))
    with (
        mock.patch.object(table, "inspect", side_effect=RuntimeError("broken")),
        pytest.warns(RuntimeWarning, match="could not look for contexts after .*: RuntimeError: broken"),
    ):
        assert devguard.guard(1)(lambda: "result")() == "result"


def test_at_the_recursion_limit_every_scope_is_left(cuda: FakeCuda) -> None:
    def recurse(depth: int) -> None:
        scope = (devguard.guard(depth % 4), devguard.unguarded(), hoisted)[depth % 3]
        with scope:
            torch.cuda.set_device(3)
            recurse(depth + 1)

    with devguard.guard(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            with pytest.raises(RecursionError):
                recurse(0)
            assert len(local.stack) == 1
            assert cuda.current == 2
