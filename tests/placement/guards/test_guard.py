"""The guard on simulated GPUs: the current device inside and after it, and where tensors land."""

from __future__ import annotations

import asyncio
import gc
import threading
import types
import warnings

import pytest
import torch

import devguard
from devguard import guard


def current() -> int:
    return torch.cuda.current_device()


class TestContextManager:
    def test_the_owner_is_current_inside_and_the_device_is_given_back(self):
        with guard("cuda:1") as device:
            assert device == torch.device("cuda:1")
            assert devguard.owner() == device
            assert current() == 1
            assert torch.empty(1, device="cuda").device.index == 1
        assert current() == 0
        assert devguard.owner() is None

    def test_guards_nest_and_one_guard_can_be_entered_again(self):
        outer = guard(1)
        with outer, guard(2), outer, guard(2):
            assert current() == 2
        with outer:
            with guard(3):
                assert current() == 3
            assert current() == 1
        assert current() == 0

    def test_the_device_is_given_back_after_an_exception(self):
        with pytest.raises(ZeroDivisionError), guard(1), guard(2):
            1 / 0  # noqa: B018
        assert current() == 0
        assert devguard.owner() is None

    @pytest.mark.parametrize("before", [0, 1])
    def test_the_device_is_given_back_after_set_device_inside(self, before):
        torch.cuda.set_device(before)
        with guard(1):
            torch.cuda.set_device(3)
        assert current() == before

    @pytest.mark.parametrize(
        "move",
        [
            lambda: torch.cuda.set_device(3),
            lambda: torch.cuda.set_stream(torch.cuda.Stream(device=3)),
            lambda: torch._C._cuda_setDevice(3),
            pytest.param(
                lambda: torch.accelerator.set_device_index(3),
                id="accelerator",
            ),
        ],
    )
    def test_the_device_is_given_back_if_the_owner_was_current_already(self, move):
        torch.cuda.set_device(1)
        for _ in range(2):  # the first exit on a thread takes another path than later ones
            with guard(1):
                with guard(1):
                    move()
                    assert current() == 3
                assert current() == 1
            assert current() == 1
            with guard(1):
                move()
                with guard(1):
                    assert current() == 1
                assert current() == 3
            assert current() == 1

    def test_the_cpu_owner_leaves_the_device_alone(self):
        torch.cuda.set_device(2)
        with guard("cpu"):
            assert devguard.owner() == torch.device("cpu")
            assert current() == 2
            torch.cuda.set_device(3)
        assert current() == 3

    def test_unguarded_inside_a_guard_has_no_owner_and_keeps_the_device(self):
        with guard(1):
            with devguard.unguarded():
                assert devguard.owner() is None
                assert current() == 1
            assert devguard.owner() == torch.device("cuda:1")

    def test_an_index_out_of_range_names_cuda_visible_devices(self):
        with pytest.raises(devguard.DeviceResolutionError, match=r"cuda:0 to cuda:3 \(CUDA_VISIBLE_DEVICES"):
            guard(7).__enter__()
        assert devguard.owner() is None

    def test_threads_can_share_a_guard(self):
        shared = guard(2)
        seen = []
        barrier = threading.Barrier(3)

        def work():
            with shared:
                barrier.wait()
                seen.append((current(), devguard.owner()))
                barrier.wait()
            seen.append(current())

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen.count((2, torch.device("cuda:2"))) == 3
        assert seen.count(0) == 3


class TestResolution:
    def test_the_owner_comes_from_the_local_rank_or_else_from_the_enclosing_scope(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with guard():
            assert current() == 2
        monkeypatch.delenv("LOCAL_RANK")
        with guard(3), guard(mode="warn"):
            assert current() == 3
        with pytest.raises(devguard.DeviceResolutionError, match="LOCAL_RANK"):
            guard().__enter__()

    def test_remap_takes_the_owner_of_the_enclosing_scope_first(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with guard(1), devguard.remap():
            assert current() == 1
        with devguard.remap():
            assert current() == 2

    def test_the_argument_is_found_by_position_keyword_and_default(self):
        @guard(argument="gpu_id")
        def work(config, gpu_id=3, *, other=None):
            return current()

        assert work({}, 1) == 1
        assert work({}, gpu_id=torch.device("cuda:2")) == 2
        assert work({}) == 3
        assert current() == 0

    def test_an_argument_that_is_none_leaves_the_choice_to_the_environment(self, monkeypatch):
        @guard(argument="gpu_id")
        def work(gpu_id=None):
            return current()

        monkeypatch.setenv("LOCAL_RANK", "1")
        assert work() == 1


class TestDecorator:
    def test_methods_of_every_kind_run_inside(self):
        class Worker:
            @guard(1)
            def method(self):
                return current()

            @guard(2)
            @staticmethod
            def static():
                return current()

            @classmethod
            @guard(3)
            def of_class(cls):
                return cls, current()

            @guard(2)
            @classmethod
            def of_class_outside(cls):
                return cls, current()

        assert Worker().method() == 1
        assert Worker.static() == Worker().static() == 2
        assert Worker.of_class() == (Worker, 3)
        assert Worker.of_class_outside() == (Worker, 2)

    def test_a_generator_holds_the_device_only_while_it_runs(self):
        ends = []

        @guard(1)
        def generate():
            try:
                got = yield current()
                yield got, current()
            finally:
                ends.append(current())

        steps = generate()
        assert next(steps) == 1
        assert current() == 0
        assert devguard.owner() is None
        with guard(3):
            assert steps.send("x") == ("x", 1)
            assert current() == 3
        steps.close()
        assert ends == [1]
        abandoned = generate()
        next(abandoned)
        del abandoned
        gc.collect()
        assert ends == [1, 1]
        assert current() == 0

    def test_exceptions_thrown_into_a_generator_are_handled_inside(self):
        @guard(2)
        def generate():
            while True:
                try:
                    yield current()
                except KeyError:
                    yield ("caught", current())

        steps = generate()
        next(steps)
        assert steps.throw(KeyError("x")) == ("caught", 2)
        with pytest.raises(ValueError, match="out"):
            steps.throw(ValueError("out"))
        assert current() == 0

    def test_interleaved_tasks_never_see_each_others_device(self):
        seen = []

        @guard(argument="index")
        async def work(index):
            for _ in range(20):
                seen.append((index, current(), devguard.owner().index))
                await asyncio.sleep(0)
                seen.append((index, current(), devguard.owner().index))

        async def bystander():
            for _ in range(20):
                seen.append((0, current(), 0 if devguard.owner() is None else -1))
                await asyncio.sleep(0)

        async def main():
            await asyncio.gather(work(1), work(2), bystander(), work(3), guard(2).run(work(1)))

        asyncio.run(main())
        assert len(seen) == 180
        assert all(row[0] == row[1] == row[2] for row in seen)
        assert current() == 0

    def test_cancellation_and_clean_up_run_inside(self):
        ends = []

        @guard(1)
        async def work():
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0)
                ends.append(current())

        async def main():
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert current() == 0

        asyncio.run(main())
        assert ends == [1]
        assert devguard.owner() is None

    def test_a_coroutine_that_is_collected_is_closed_inside(self):
        ends = []

        @types.coroutine
        def suspend():
            yield

        @guard(1)
        async def work():
            try:
                await suspend()
            finally:
                ends.append(current())

        coroutine = work()
        coroutine.send(None)
        assert current() == 0
        del coroutine
        gc.collect()
        assert ends == [1]
        assert current() == 0

    def test_an_async_generator_steps_throws_and_closes_inside(self):
        ends = []
        closed = asyncio.Event()

        @guard(1)
        async def generate():
            try:
                while True:
                    try:
                        await asyncio.sleep(0)
                        yield current()
                    except KeyError:
                        yield ("caught", current())
            finally:
                await asyncio.sleep(0)
                ends.append(current())
                closed.set()

        async def main():
            steps = generate()
            assert await anext(steps) == 1
            assert current() == 0
            assert await steps.asend(None) == 1
            assert await steps.athrow(KeyError("x")) == ("caught", 1)
            await steps.aclose()
            assert ends == [1]
            closed.clear()
            async for value in generate():
                assert value == 1
                break
            await closed.wait()  # the event loop closes the abandoned generator
            assert current() == 0

        asyncio.run(main())
        assert ends == [1, 1]
        assert current() == 0

    def test_a_plain_with_inside_a_decorated_coroutine_is_suspended_with_it(self):
        @guard(1)
        async def work():
            with guard(2):
                await asyncio.sleep(0)
                assert current() == 2
                await asyncio.sleep(0)
            assert current() == 1

        async def bystander():
            for _ in range(4):
                assert current() == 0
                await asyncio.sleep(0)

        async def main():
            await asyncio.gather(work(), bystander(), work())

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            asyncio.run(main())
        assert current() == 0

    def test_run_guards_every_awaitable_but_a_task(self):
        class Awaitable:
            def __await__(self):
                yield from asyncio.sleep(0).__await__()
                return current()

        async def main():
            assert await guard(2).run(Awaitable()) == 2
            with pytest.raises(TypeError, match="create_task"):
                await guard(2).run(asyncio.get_running_loop().create_future())

        asyncio.run(main())

    def test_bound_functions_run_inside(self):
        assert guard(2).bind(current)() == 2
        assert guard(argument="k").bind(lambda k: current())(k=3) == 3


class TestMisuse:
    def test_the_error_of_async_with_names_run(self):
        async def main():
            async with guard(1):
                raise AssertionError("unreachable")

        with pytest.raises(TypeError, match=r"guard\(\.\.\.\)\.run"):
            asyncio.run(main())
        assert current() == 0

    def test_a_plain_with_held_across_an_await_warns_and_the_device_is_given_back(self):
        async def work(index):
            with guard(index):
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        async def main():
            await asyncio.gather(work(1), work(2))

        with pytest.warns(RuntimeWarning, match="held across an await") as caught:
            asyncio.run(main())
        assert caught[0].filename == __file__
        assert current() == 0
        assert devguard.owner() is None
