"""Work handed to the threads of anyio, asgiref and gevent runs in the scopes of the code that hands it over."""

from __future__ import annotations

import asyncio
import inspect
import io
import pickle
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import asgiref.sync
import gevent.threadpool
import pytest
import torch

import devguard
from devguard import guard
from devguard.ownership import in_force
from devguard.ownership.stack import local
from tests.helpers.handed_work import check_restored, on_a_fresh_thread
from tests.helpers.programs import run_child

Handed = Callable[[Callable[[], Any]], Awaitable[Any]]


def seen() -> tuple[int, str]:
    return torch.cuda.current_device(), str(devguard.owner())


def everything() -> tuple[Any, ...]:
    """Return all that a scope sets: the device, the owner and the modes."""
    modes = [in_force.mode_of(door) for door in ("load", "ipc", "buffers")]
    return *seen(), modes, in_force.is_requested("buffers")


async def with_anyio(work: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(work)


async def with_asgiref(work: Callable[[], Any]) -> Any:
    return await asgiref.sync.sync_to_async(work)()


async def with_a_pool_of_asgiref(work: Callable[[], Any]) -> Any:
    return await asgiref.sync.sync_to_async(work, thread_sensitive=False)()


async def from_anyio(work: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(lambda: anyio.from_thread.run_sync(work))


async def step_from_anyio(work: Callable[[], Any]) -> Any:
    async def step() -> Any:
        await asyncio.sleep(0)
        before = work()
        await asyncio.sleep(0)
        assert work() == before
        return before

    return await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(step))


async def from_asgiref(work: Callable[[], Any]) -> Any:
    async def step() -> Any:
        await asyncio.sleep(0)
        return work()

    return await asgiref.sync.sync_to_async(asgiref.sync.async_to_sync(step))()


async def through_asgiref_twice(work: Callable[[], Any]) -> Any:
    """Run the work on the thread that waits in ``async_to_sync``, as Django does."""

    async def inner() -> Any:
        return await asgiref.sync.sync_to_async(work)()

    return await asyncio.to_thread(asgiref.sync.async_to_sync(inner))


WAYS: list[Handed] = [
    with_anyio, with_asgiref, with_a_pool_of_asgiref, from_anyio, step_from_anyio, from_asgiref, through_asgiref_twice,
]  # fmt: skip

SCOPES: list[Callable[[], Any]] = [
    lambda: guard(1),
    lambda: guard(2, mode="error"),
    lambda: guard(3, doors={"load": "observe"}),
    lambda: guard("cpu"),
    devguard.unguarded,
    lambda: devguard.remap(2),
]


def expected(scope: Any) -> tuple[Any, ...]:
    return tuple(on_a_fresh_thread(scope, everything))


async def beside_another_task(step: Callable[[], Awaitable[Any]]) -> tuple[Any, set[Any]]:
    """Return what `step` returns, handed back by a thread under a guard, and what another task sees meanwhile."""
    noted: list[Any] = []

    async def watch() -> None:
        for _ in range(10):
            noted.append(seen())
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    result = await guard(1).run(anyio.to_thread.run_sync(lambda: anyio.from_thread.run(step)))
    await watching
    return result, set(noted)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("first", SCOPES[:2])
    def test_work_runs_in_the_scope_of_its_submitter_whoever_started_the_worker(self, way, scope, first):
        async def main() -> Any:
            async def submit() -> Any:
                return await way(everything)

            await first().run(submit())
            return await scope().run(submit())

        wanted = expected(scope())
        assert asyncio.run(main()) == wanted

    def test_work_from_outside_every_scope_has_none_of_an_earlier_one(self, way):
        data = pickle.dumps(torch.ones(4).to("cuda:0"))

        async def main() -> Any:
            before = await way(seen)

            async def guarded() -> Any:
                return await way(seen), await way(lambda: str(pickle.loads(data).device))

            within = await guard(1).run(guarded())
            return before, within, await way(seen), await way(lambda: str(pickle.loads(data).device))

        assert asyncio.run(main()) == ((0, "None"), ((1, "cuda:1"), "cuda:1"), (0, "None"), "cuda:0")

    def test_a_worker_from_before_the_first_guard_runs_work_in_its_scope(self, way):
        async def main() -> Any:
            await way(seen)
            return await guard(2).run(way(seen))

        assert asyncio.run(main()) == (2, "cuda:2")

    def test_work_leaves_nothing_behind(self, way):
        def leave_a_scope() -> None:
            guard(3).__enter__()
            torch.cuda.set_device(2)

        async def main() -> Any:
            await guard(1).run(way(leave_a_scope))
            return await way(seen), await way(lambda: len(local.stack)), seen()

        assert asyncio.run(main()) == ((0, "None"), 0, (0, "None"))

    def test_work_under_two_guards_at_once_runs_under_its_own(self, way):
        async def main() -> Any:
            async def repeat() -> Any:
                return {await way(seen) for _ in range(5)}

            return await asyncio.gather(*(guard(index).run(repeat()) for index in (1, 2, 3)))

        assert asyncio.run(main()) == [{(index, f"cuda:{index}")} for index in (1, 2, 3)]

    def test_exceptions_and_results_pass_through(self, way):
        def fail() -> None:
            raise ZeroDivisionError("division")

        async def main() -> Any:
            with pytest.raises(ZeroDivisionError, match="division"):
                await guard(1).run(way(fail))
            return await guard(1).run(way(lambda: 7)), await way(seen)

        assert asyncio.run(main()) == (7, (0, "None"))

    def test_after_uninstall_work_has_no_scope(self, way):
        async def main() -> Any:
            await guard(1).run(way(seen))
            devguard.uninstall()
            return await guard(1).run(_uninstalled(way))

        assert asyncio.run(main()) == (0, "None")


async def _uninstalled(way: Handed) -> Any:
    devguard.uninstall()
    return await way(seen)


def test_a_guard_held_in_a_coroutine_that_is_handed_over_is_left_while_it_is_suspended():
    async def step() -> Any:
        with guard(2):
            first = seen()
            await asyncio.sleep(0)
            second = seen()
        return first, second, seen()

    assert asyncio.run(beside_another_task(step)) == (((2, "cuda:2"), (2, "cuda:2"), (1, "cuda:1")), {(0, "None")})


def test_a_portal_runs_each_call_in_the_scope_of_its_caller():
    async def step() -> Any:
        await asyncio.sleep(0)
        return seen()

    with guard(3), anyio.from_thread.start_blocking_portal() as portal:
        with guard(1):
            assert portal.call(seen) == portal.call(step) == (1, "cuda:1")
            assert portal.start_task_soon(step).result() == (1, "cuda:1")
        with guard(2):
            assert portal.call(seen) == portal.call(step) == (2, "cuda:2")


def test_a_task_that_a_portal_starts_reports_that_it_has_started():
    async def step(*, task_status: Any) -> Any:
        task_status.started(seen())
        await asyncio.sleep(0)
        return seen()

    with anyio.from_thread.start_blocking_portal() as portal, guard(2):
        future, started = portal.start_task(step)
        assert (future.result(), started) == ((2, "cuda:2"), (2, "cuda:2"))


def test_a_context_manager_of_a_portal_runs_in_the_scope_of_its_caller():
    got: list[Any] = []

    class Noting:
        async def __aenter__(self) -> None:
            got.append(seen())

        async def __aexit__(self, *error: object) -> None:
            got.append(seen())

    with anyio.from_thread.start_blocking_portal() as portal, guard(2), portal.wrap_async_context_manager(Noting()):
        pass
    assert got == [(2, "cuda:2")] * 2


def test_a_coroutine_that_is_cancelled_leaves_no_scope():
    async def forever() -> None:
        await asyncio.sleep(3600)

    async def main() -> Any:
        task = asyncio.create_task(
            guard(1).run(anyio.to_thread.run_sync(_from_thread, forever, abandon_on_cancel=True))
        )
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen()

    assert asyncio.run(main()) == (0, "None")


def _from_thread(function: Any) -> None:
    with pytest.raises((asyncio.CancelledError, RuntimeError, Exception)):
        anyio.from_thread.run(function)


def test_asgiref_runs_the_outermost_coroutine_in_the_scope_of_its_caller():
    async def step() -> Any:
        first = seen()
        await asyncio.sleep(0)
        return first, seen(), await asgiref.sync.sync_to_async(seen)()

    with guard(2):
        assert asgiref.sync.async_to_sync(step)() == ((2, "cuda:2"),) * 3
        assert seen() == (2, "cuda:2")
    assert asgiref.sync.async_to_sync(step)() == ((0, "None"),) * 3


def test_gevents_pools_of_threads_run_work_in_the_scope_of_its_submitter():
    code = (
        "import gevent.threadpool\n"
        "def seen(*_): return torch.cuda.current_device(), str(devguard.owner())\n"
        "pool, executor = gevent.threadpool.ThreadPool(1), gevent.threadpool.ThreadPoolExecutor(1)\n"
        "def ways():\n"
        "    one, two = pool.spawn(seen).get(), pool.apply(seen)\n"
        "    return [one, two, *pool.map(seen, [0]), executor.submit(seen).result(), *pool.imap(seen, [0]),\n"
        "        *pool.imap_unordered(seen, [0]), *pool.map_async(seen, [0]).get(), pool.apply_async(seen).get()]\n"
        "for index in (1, 2):\n"
        "    with devguard.guard(index):\n"
        "        got = ways()\n"
        "    assert got == [(index, f'cuda:{index}')] * 8, got\n"
        "got = ways()\n"
        "assert got == [(0, 'None')] * 8, got\n"
        "print(devguard.status()['doors']['threads']['failures'])"
    )
    assert run_child(code) == "[]"


@pytest.mark.parametrize("order", ["before", "after"])
def test_libraries_may_be_imported_before_or_after_the_doors_open(order):
    load = "import anyio.to_thread, anyio.from_thread, asgiref.sync\n"
    code = (
        "import asyncio\n"
        f"{load if order == 'before' else ''}"
        "with devguard.guard(1): pass\n"
        f"{load}"
        "def seen(): return torch.cuda.current_device(), str(devguard.owner())\n"
        "async def main():\n"
        "    return await anyio.to_thread.run_sync(seen), await asgiref.sync.sync_to_async(seen)()\n"
        "print(asyncio.run(devguard.guard(2).run(main())))"
    )
    assert run_child(code) == "((2, 'cuda:2'), (2, 'cuda:2'))"


def test_devguard_imports_none_of_the_libraries():
    code = (
        "with devguard.guard(1): pass\n"
        "print([name for name in ('anyio', 'asgiref', 'gevent', 'trio') if name in sys.modules])"
    )
    assert run_child(code) == "[]"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_loop_makes_no_difference(loop):
    uvloop = pytest.importorskip("uvloop") if loop == "uvloop" else None

    async def main() -> Any:
        return [await guard(2).run(way(seen)) for way in WAYS], [await way(seen) for way in WAYS]

    runner = uvloop.run if uvloop else asyncio.run
    assert runner(main()) == ([(2, "cuda:2")] * len(WAYS), [(0, "None")] * len(WAYS))


def test_uninstall_restores_the_libraries():
    check_restored(PATCHED)


import anyio._backends._asyncio as backend  # noqa: E402
import asgiref.current_thread_executor as current_thread  # noqa: E402

PATCHED = [
    (backend.AsyncIOBackend, "run_sync_in_worker_thread"),
    (backend.AsyncIOBackend, "run_async_from_thread"),
    (backend.AsyncIOBackend, "run_sync_from_thread"),
    (anyio.from_thread.BlockingPortal, "start_task_soon"),
    (anyio.from_thread.BlockingPortal, "start_task"),
    (current_thread.CurrentThreadExecutor, "submit"),
    (asgiref.sync.AsyncToSync, "main_wrap"),
    (gevent.threadpool.ThreadPool, "spawn"),
]


def test_the_functions_keep_their_kind():
    with guard(1):
        assert isinstance(inspect.getattr_static(backend.AsyncIOBackend, "run_sync_in_worker_thread"), classmethod)
        assert inspect.iscoroutinefunction(backend.AsyncIOBackend.run_sync_in_worker_thread)


def test_a_release_without_a_function_leaves_the_others_watched(monkeypatch):
    monkeypatch.delattr(backend.AsyncIOBackend, "run_async_from_thread")
    with guard(1):
        row = devguard.status()["doors"]["threads"]
        assert row["open"]
        assert "run_async_from_thread" in row["failures"][0]

        async def main() -> Any:
            return await anyio.to_thread.run_sync(seen)

    assert asyncio.run(guard(2).run(main())) == (2, "cuda:2")


@pytest.mark.parametrize("way", [with_anyio, with_asgiref])
def test_the_call_site_of_a_stray_is_the_line_that_hands_it_over(way):
    file = io.BytesIO()
    torch.save(torch.ones(4).to("cuda:0"), file)

    async def main() -> Any:
        file.seek(0)
        if way is with_anyio:
            return await anyio.to_thread.run_sync(torch.load, file), sys._getframe().f_lineno
        return await asgiref.sync.sync_to_async(torch.load)(file), sys._getframe().f_lineno

    loaded, line = asyncio.run(guard(1).run(main()))
    assert str(loaded.device) == "cuda:1"
    (stray,) = [stray for stray in devguard.strays() if stray.door == "load"]
    assert (stray.site.file, stray.site.line) == (__file__, line)


def test_the_device_that_a_coroutine_makes_current_is_its_own():
    async def step() -> Any:
        with torch.cuda.device(3):
            await asyncio.sleep(0)
            inside = seen()
        await asyncio.sleep(0)
        return inside, seen()

    assert asyncio.run(beside_another_task(step)) == (((3, "cuda:1"), (1, "cuda:1")), {(0, "None")})
