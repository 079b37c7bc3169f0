"""Coroutines and generators: the device is held while they run, and only then."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def where(cuda: FakeCuda) -> tuple[int, str]:
    return cuda.current, str(devguard.owner())


ONE, TWO, UNOWNED = (1, "cuda:1"), (2, "cuda:2"), (0, "None")


# --- generators ---


def test_a_generator_restores_the_device_at_each_yield(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Generator[Any, None, str]:
        for _ in range(3):
            yield where(cuda)
        return "done"

    steps = work()
    assert where(cuda) == UNOWNED
    for _ in range(3):
        assert next(steps) == ONE
        assert where(cuda) == UNOWNED
    with pytest.raises(StopIteration) as stopped:
        next(steps)
    assert stopped.value.value == "done"
    assert where(cuda) == UNOWNED


def test_a_step_on_the_current_device_calls_at_most_one_exchange(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Iterator[None]:
        yield
        yield

    with devguard.guard("cuda:1"):
        pass
    torch.cuda.set_device(1)
    steps = work()
    next(steps)
    cuda.calls.clear()
    next(steps)
    assert len(cuda.calls) <= 1
    steps.close()


def test_send_and_throw_reach_the_generator_inside_its_scope(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Generator[Any, Any, Any]:
        received = []
        while True:
            try:
                received.append(((yield received), where(cuda)))
            except LookupError as error:
                received.append((str(error), where(cuda)))
            except ZeroDivisionError:
                return received

    steps = work()
    next(steps)
    steps.send("a")
    assert where(cuda) == UNOWNED
    steps.throw(LookupError("b"))
    assert where(cuda) == UNOWNED
    with pytest.raises(StopIteration) as stopped:
        steps.throw(ZeroDivisionError())
    assert stopped.value.value == [("a", ONE), ("b", ONE)]
    assert where(cuda) == UNOWNED


def test_an_exception_from_a_generator_restores_the_device(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Iterator[None]:
        yield
        raise LookupError("inside")

    steps = work()
    next(steps)
    with pytest.raises(LookupError, match="inside"):
        next(steps)
    assert where(cuda) == UNOWNED
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize("how", ["close", "del", "garbage"])
def test_the_clean_up_code_of_a_generator_runs_on_its_own_device(cuda: FakeCuda, how: str) -> None:
    seen = []

    @devguard.guard("cuda:1")
    def work(cycle: list[Any]) -> Iterator[Any]:
        try:
            yield cycle
        finally:
            seen.append(where(cuda))

    cycle: list[Any] = []
    steps: Any = work(cycle)
    next(steps)
    if how == "close":
        steps.close()
    elif how == "garbage":
        cycle.append(steps)
    del steps, cycle
    gc.collect()
    assert seen == [ONE]
    assert where(cuda) == UNOWNED


def test_a_generator_that_ignores_close_is_an_error_as_without_a_guard(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Iterator[None]:
        try:
            yield
        except GeneratorExit:
            yield

    steps: Any = work()
    next(steps)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        steps.close()
    assert where(cuda) == UNOWNED


def test_yield_from_a_decorated_generator_passes_values_in_and_out(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:2")
    def inner() -> Generator[Any, Any, Any]:
        got = yield where(cuda)
        return got, where(cuda)

    @devguard.guard("cuda:1")
    def outer() -> Generator[Any, Any, Any]:
        result = yield from inner()
        yield result, where(cuda)

    steps = outer()
    assert next(steps) == TWO
    assert where(cuda) == UNOWNED
    assert steps.send("x") == (("x", TWO), ONE)
    steps.close()


def test_two_interleaved_generators_never_see_each_others_device(cuda: FakeCuda) -> None:
    @devguard.guard(argument="index")
    def work(index: int) -> Iterator[bool]:
        for _ in range(5):
            yield where(cuda) == (index, f"cuda:{index}")

    assert all(a and b for a, b in zip(work(1), work(2), strict=True))
    assert where(cuda) == UNOWNED


def test_a_decorated_generator_serves_contextmanager(cuda: FakeCuda) -> None:
    seen = []

    @contextlib.contextmanager
    @devguard.guard("cuda:1")
    def managed() -> Iterator[None]:
        seen.append(where(cuda))
        try:
            yield
        finally:
            seen.append(where(cuda))

    with pytest.raises(LookupError), managed():
        assert where(cuda) == UNOWNED
        raise LookupError
    assert seen == [ONE, ONE]


def test_the_body_of_a_decorated_function_does_not_run_before_the_first_step(cuda: FakeCuda) -> None:
    ran = []

    @devguard.guard("cuda:1")
    def work() -> Iterator[None]:
        ran.append(1)
        yield

    @devguard.guard("cuda:1")
    async def coroutine() -> None:
        ran.append(2)

    work()
    coroutine().close()
    assert ran == []
    assert cuda.calls == []


# --- coroutines ---


async def turns(cuda: FakeCuda, index: int, count: int = 5) -> list[tuple[int, str]]:
    seen = []
    for _ in range(count):
        seen.append(where(cuda))
        await asyncio.sleep(0)
    return seen


def test_interleaved_tasks_with_different_owners_never_see_each_others_device(cuda: FakeCuda) -> None:
    decorated = devguard.guard(argument="index")(turns)

    async def main() -> list[Any]:
        return await asyncio.gather(
            decorated(cuda, 1),
            decorated(cuda, 2),
            devguard.guard(3).run(turns(cuda, 0)),
            turns(cuda, 0),
            devguard.guard("cpu").run(turns(cuda, 0)),
        )

    one, two, three, unowned, cpu = asyncio.run(main())
    assert one == [ONE] * 5
    assert two == [TWO] * 5
    assert three == [(3, "cuda:3")] * 5
    assert unowned == [UNOWNED] * 5
    assert cpu == [(0, "cpu")] * 5
    assert where(cuda) == UNOWNED


def test_the_event_loop_runs_on_its_own_device_between_steps(cuda: FakeCuda) -> None:
    seen = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(devguard.guard(1).run(turns(cuda, 1)))
        while not task.done():
            loop.call_soon(lambda: seen.append(where(cuda)))
            await asyncio.sleep(0)

    asyncio.run(main())
    assert set(seen) == {UNOWNED}


def test_a_task_that_a_task_starts_does_not_inherit_its_owner_and_a_thread_does(cuda: FakeCuda) -> None:
    """The event loop steps the new task outside the scope of the task that started it."""

    @devguard.guard("cuda:1")
    async def main() -> Any:
        child = asyncio.create_task(turns(cuda, 0, 1))
        threads = await asyncio.to_thread(where, cuda)
        return await child, threads

    assert asyncio.run(main()) == ([UNOWNED], ONE)


def test_cancellation_is_raised_inside_the_scope_and_restores_the_device(cuda: FakeCuda) -> None:
    seen = []

    @devguard.guard("cuda:1")
    async def work(started: asyncio.Event) -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(where(cuda))
            await asyncio.sleep(0)
            seen.append(where(cuda))
            raise

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(work(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen.append(where(cuda))

    asyncio.run(main())
    assert seen == [ONE, ONE, UNOWNED]


def test_a_coroutine_that_suppresses_its_cancellation_keeps_its_device(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    async def work() -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        return where(cuda)

    async def main() -> Any:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(main()) == ONE


def test_closing_a_coroutine_cleans_up_on_its_own_device(cuda: FakeCuda) -> None:
    seen = []

    @devguard.guard("cuda:1")
    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            seen.append(where(cuda))

    coroutine = work()
    coroutine.send(None)
    assert where(cuda) == UNOWNED
    coroutine.close()
    assert seen == [ONE]
    assert where(cuda) == UNOWNED


def test_asyncio_timeouts_work_through_run(cuda: FakeCuda) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(devguard.guard(1).run(asyncio.Event().wait()), 0.001)
        assert where(cuda) == UNOWNED

    asyncio.run(main())


def test_run_awaits_any_awaitable_and_returns_its_result(cuda: FakeCuda) -> None:
    class Awaitable:
        def __await__(self) -> Generator[Any, None, Any]:
            yield from asyncio.sleep(0).__await__()
            return where(cuda)

    assert asyncio.run(devguard.guard(1).run(Awaitable())) == ONE
    assert asyncio.run(devguard.guard(2).run(turns(cuda, 0, 1))) == [TWO]


class PlainIterator:
    """An awaitable with an iterator that has only ``__next__``, as Python allows."""

    def __await__(self) -> Iterator[Any]:
        return iter([None, None])


def test_an_awaitable_of_a_plain_iterator_can_be_run() -> None:
    async def main() -> None:
        await devguard.guard("cpu").run(PlainIterator())
        assert not local.stack

    asyncio.run(main())
    assert devguard.owner() is None


def test_an_awaitable_of_a_plain_iterator_can_be_cancelled() -> None:
    async def main() -> None:
        task = asyncio.create_task(devguard.guard("cpu").run(PlainIterator()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not local.stack

    asyncio.run(main())


def test_an_awaitable_of_a_plain_iterator_can_be_closed() -> None:
    coroutine = devguard.guard("cpu").run(PlainIterator())
    coroutine.send(None)
    assert not local.stack
    coroutine.close()
    assert not local.stack
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)


def test_run_refuses_tasks_and_futures_because_the_event_loop_steps_them(cuda: FakeCuda) -> None:
    async def main() -> None:
        task = asyncio.create_task(asyncio.sleep(0))
        with pytest.raises(TypeError, match="create_task"):
            await devguard.guard(1).run(task)
        future = asyncio.get_running_loop().create_future()
        with pytest.raises(TypeError, match="event loop steps"):
            await devguard.guard(1).run(future)
        await task

    asyncio.run(main())


def test_run_without_a_device_takes_the_enclosing_guards(cuda: FakeCuda) -> None:
    @devguard.guard(2)
    async def main() -> Any:
        return await devguard.guard().run(turns(cuda, 0, 2))

    assert asyncio.run(main()) == [TWO, TWO]


def test_nested_decorated_coroutines_hold_their_own_devices(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:2")
    async def inner() -> list[Any]:
        first = where(cuda)
        await asyncio.sleep(0)
        return [first, where(cuda)]

    @devguard.guard("cuda:1")
    async def outer() -> list[Any]:
        first = where(cuda)
        nested = await inner()
        return [first, *nested, where(cuda)]

    assert asyncio.run(outer()) == [ONE, TWO, TWO, ONE]


# --- a plain `with guard()` held across a suspend, inside a decorated coroutine ---


@pytest.mark.parametrize("outer", [devguard.guard("cuda:1"), devguard.guard("cpu"), devguard.unguarded()], ids=repr)
def test_a_with_block_in_a_decorated_coroutine_is_left_and_entered_with_it(cuda: FakeCuda, outer: Any) -> None:
    @outer
    async def work() -> Any:
        with devguard.guard("cuda:2"):
            await asyncio.sleep(0)
            return where(cuda)

    coroutine = work()
    coroutine.send(None)
    assert where(cuda) == UNOWNED
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == TWO
    assert where(cuda) == UNOWNED


def test_a_with_block_in_a_coroutine_on_the_current_device_is_left_and_entered_with_it(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)

    @devguard.guard("cuda:1")
    async def work() -> Any:
        with devguard.guard("cuda:2"):
            await asyncio.sleep(0)
            return where(cuda)

    coroutine = work()
    coroutine.send(None)
    assert cuda.current == 1
    torch.cuda.set_device(5)
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == TWO
    assert cuda.current == 5


@pytest.mark.parametrize("innermost", [devguard.guard("cpu"), devguard.unguarded()], ids=repr)
def test_the_innermost_device_is_restored_even_under_a_scope_that_took_none(cuda: FakeCuda, innermost: Any) -> None:
    @devguard.guard("cuda:1")
    async def work() -> Any:
        with devguard.guard("cuda:2"), innermost:
            await asyncio.sleep(0)
            return cuda.current

    coroutine = work()
    coroutine.send(None)
    assert where(cuda) == UNOWNED
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == 2
    assert where(cuda) == UNOWNED


@pytest.mark.parametrize("outer", [devguard.guard("cuda:1"), devguard.guard("cpu"), devguard.unguarded()], ids=repr)
def test_a_resumed_block_restores_the_device_on_which_it_was_resumed(cuda: FakeCuda, outer: Any) -> None:
    """The device of the thread may have changed during the suspend."""

    @outer
    async def work() -> Any:
        with devguard.guard("cuda:2"), devguard.guard("cuda:3"):
            await asyncio.sleep(0)
            seen = [cuda.current]
        return [*seen, cuda.current]

    coroutine = work()
    coroutine.send(None)
    torch.cuda.set_device(6)
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == [3, 1 if outer == devguard.guard(1) else 6]
    assert where(cuda) == (6, "None")


def test_a_step_on_another_thread_restores_the_device_of_that_thread(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    def work() -> Iterator[Any]:
        with devguard.guard("cuda:2"):
            while True:
                yield where(cuda)

    steps = work()
    assert next(steps) == TWO
    seen: list[Any] = []

    def elsewhere() -> None:
        torch.cuda.set_device(5)
        seen.append(next(steps))
        seen.append(where(cuda))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [TWO, (5, "None")]
    assert next(steps) == TWO
    steps.close()
    assert where(cuda) == UNOWNED


def test_a_with_block_in_a_bare_coroutine_is_reported(cuda: FakeCuda) -> None:
    from devguard.guards import unwind

    unwind._reported.clear()

    async def bare(index: int) -> None:
        with devguard.guard(f"cuda:{index}"):
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(bare(1), bare(2))

    with pytest.warns(RuntimeWarning, match="held across an await") as caught:
        asyncio.run(main())
    assert caught[0].filename == __file__
    assert where(cuda) == UNOWNED
    unwind._reported.clear()


# --- asynchronous generators ---


@devguard.guard(argument="index")
async def items(cuda: FakeCuda, index: int, seen: list[Any]) -> AsyncGenerator[Any, Any]:
    try:
        got = None
        while True:
            try:
                await asyncio.sleep(0)
                got = yield got, where(cuda)
            except LookupError as error:
                got = str(error)
    finally:
        await asyncio.sleep(0)
        seen.append(where(cuda))


def test_an_asynchronous_generator_holds_its_device_only_while_it_runs(cuda: FakeCuda) -> None:
    async def main() -> None:
        seen: list[Any] = []
        steps = items(cuda, 1, seen)
        assert inspect.isasyncgen(steps)
        assert await anext(steps) == (None, ONE)
        assert where(cuda) == UNOWNED
        assert await steps.asend("a") == ("a", ONE)
        assert where(cuda) == UNOWNED
        assert await steps.athrow(LookupError("b")) == ("b", ONE)
        assert where(cuda) == UNOWNED
        await steps.aclose()
        assert seen == [ONE]
        assert where(cuda) == UNOWNED
        with pytest.raises(StopAsyncIteration):
            await anext(steps)

    asyncio.run(main())


def test_an_asynchronous_generator_ends_and_raises_as_without_a_guard(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    async def work(fail: bool) -> AsyncGenerator[int, None]:
        yield 1
        if fail:
            raise ZeroDivisionError
        yield 2

    async def main() -> None:
        assert [item async for item in work(False)] == [1, 2]
        with pytest.raises(ZeroDivisionError):
            _ = [item async for item in work(True)]
        assert where(cuda) == UNOWNED

    asyncio.run(main())


def test_an_exception_thrown_into_an_asynchronous_generator_is_raised_if_it_is_not_caught(cuda: FakeCuda) -> None:
    async def main() -> None:
        seen: list[Any] = []
        steps = items(cuda, 1, seen)
        await anext(steps)
        with pytest.raises(ZeroDivisionError):
            await steps.athrow(ZeroDivisionError())
        assert seen == [ONE]
        assert where(cuda) == UNOWNED

    asyncio.run(main())


def test_interleaved_asynchronous_generators_never_see_each_others_device(cuda: FakeCuda) -> None:
    async def consume(index: int) -> list[Any]:
        seen: list[Any] = []
        steps = items(cuda, index, seen)
        try:
            return [(await anext(steps))[1] for _ in range(4)]
        finally:
            await steps.aclose()

    async def main() -> list[Any]:
        return await asyncio.gather(consume(1), consume(2))

    assert asyncio.run(main()) == [[ONE] * 4, [TWO] * 4]


def test_cancellation_inside_an_asynchronous_generator_cleans_up_on_its_own_device(cuda: FakeCuda) -> None:
    seen: list[Any] = []

    @devguard.guard("cuda:1")
    async def work() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
            yield 2
        finally:
            seen.append(where(cuda))

    async def consume() -> None:
        async for _ in work():
            pass

    async def main() -> None:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == [ONE]
    assert where(cuda) == UNOWNED


def test_an_abandoned_asynchronous_generator_cleans_up_on_its_own_device(cuda: FakeCuda) -> None:
    seen: list[Any] = []

    async def main() -> None:
        async for _ in items(cuda, 1, seen):
            break
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert seen == [ONE]


def test_asynchronous_generators_left_open_at_the_end_of_the_loop_clean_up_on_their_own_device(
    cuda: FakeCuda,
) -> None:
    """The loop closes the generators that it knows in any order, so it must not know the undecorated one inside."""
    seen: list[Any] = []
    kept = [items(cuda, 1, seen) for _ in range(16)]

    async def main() -> None:
        for steps in kept:
            await anext(steps)

    asyncio.run(main())
    assert seen == [ONE] * 16


# --- the current device belongs to the frame ---


@contextlib.contextmanager
def torchs_block(cuda: FakeCuda, index: int) -> Iterator[None]:
    """As ``torch.cuda.device``."""
    before = cuda.exchange(index)
    yield
    cuda.maybe_exchange(before)


BLOCKS = {
    "torch.cuda.device": torchs_block,
    "guard": lambda cuda, index: devguard.guard(index),
}


class Turn:
    """Awaits one turn of the event loop, or of the code that steps the coroutine."""

    def __await__(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("how", ["generator", "coroutine", "run", "asynchronous generator"])
def test_a_device_chosen_inside_is_kept_over_a_suspend(cuda: FakeCuda, block: Any, how: str) -> None:
    seen: list[int] = []

    def generate() -> Iterator[None]:
        with block(cuda, 2):
            yield
            seen.append(cuda.current)
        seen.append(cuda.current)
        yield

    async def coroutine() -> None:
        for _ in generate():
            await Turn()

    async def items() -> AsyncGenerator[None, None]:
        for _ in generate():
            yield

    scope = devguard.guard(1)
    torch.cuda.set_device(3)
    if how == "generator":
        steps: Any = scope(generate)()
    elif how == "asynchronous generator":
        inner = scope(items)()

        async def consume() -> None:
            async for _ in inner:
                assert cuda.current == 3
                await Turn()

        steps = consume().__await__()
    else:
        steps = (scope(coroutine)() if how == "coroutine" else scope.run(coroutine())).__await__()
    for _ in steps:
        assert where(cuda) == (3, "None")
        torch.cuda.set_device(3)
    assert seen == [2, 1]
    assert where(cuda) == (3, "None")


@pytest.mark.parametrize("scope", [devguard.unguarded(), devguard.guard("cpu")], ids=repr)
def test_a_scope_that_takes_no_device_keeps_and_gives_back_as_well(cuda: FakeCuda, scope: Any) -> None:
    with devguard.guard(1):
        pass
    seen = []

    @scope
    def work() -> Iterator[None]:
        seen.append(cuda.current)
        yield
        seen.append(cuda.current)  # it has chosen none, so it follows its surroundings
        with torchs_block(cuda, 2):
            yield
            seen.append(cuda.current)
        seen.append(cuda.current)
        yield

    steps = work()
    for outside in (3, 4, 5):
        torch.cuda.set_device(outside)
        next(steps)
        assert cuda.current == outside
    assert seen == [3, 4, 2, 4]


def test_a_scope_held_in_an_asynchronous_generator_is_suspended_with_it(cuda: FakeCuda) -> None:
    @devguard.guard(1)
    async def items() -> AsyncGenerator[Any, None]:
        with devguard.guard(2):
            yield where(cuda)
            yield where(cuda)
        yield where(cuda)

    async def main() -> None:
        seen = []
        async for item in items():
            assert where(cuda) == UNOWNED
            assert not local.stack
            seen.append(item)
        assert seen == [TWO, TWO, ONE]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("scope", "home"), [(devguard.guard("cpu"), 0), (devguard.unguarded(), 0), (devguard.guard(3), 3)], ids=repr
)
def test_a_scope_held_in_a_generator_can_be_left_on_a_thread_that_has_taken_no_device(
    cuda: FakeCuda, scope: Any, home: int
) -> None:
    @scope
    def work() -> Iterator[Any]:
        with devguard.guard(1):
            yield where(cuda)
            yield where(cuda)
        yield cuda.current

    steps = work()
    seen: list[Any] = [next(steps)]

    def go_on() -> None:
        seen.extend(steps)
        seen.append(cuda.current)

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    assert seen == [ONE, ONE, home, 0]
