"""The standard library's pools of threads: each task runs within the scopes of the code that submitted it."""

from __future__ import annotations

import asyncio
import asyncio.threads
import contextlib
import functools
import inspect
import io
import multiprocessing.dummy
import pickle
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.ownership import in_force
from devguard.ownership.stack import local
from tests.helpers.handed_work import on_a_fresh_thread


def seen(*_: Any) -> tuple[int, str]:
    return torch.cuda.current_device(), str(devguard.owner())


def everything(*_: Any) -> tuple[Any, ...]:
    modes = [in_force.mode_of(door) for door in ("load", "ipc", "buffers")]
    return *seen(), modes, in_force.is_requested("buffers"), len(local.stack)


class Copied(futures.ThreadPoolExecutor):
    """An executor with a queue and a ``submit`` of its own, as public priority pools have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._work_queue: Any = queue.Queue()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        future: futures.Future[Any] = futures.Future()
        if sys.version_info >= (3, 14):
            item = futures.thread._WorkItem(future, (fn, args, kwargs))
        else:
            item = futures.thread._WorkItem(future, fn, args, kwargs)
        self._work_queue.put(item)
        self._adjust_thread_count()
        return future


class Bounded(futures.ThreadPoolExecutor):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(lambda: fn(*args, **kwargs))


Submit = Callable[[Any], Any]


def of_executor(kind: Any) -> Callable[[], Iterator[Submit]]:
    def make() -> Iterator[Submit]:
        with kind(1) as pool:
            yield lambda work: pool.submit(work).result()

    make.__name__ = kind.__name__
    return make


def mapped() -> Iterator[Submit]:
    with futures.ThreadPoolExecutor(1) as pool:
        yield lambda work: next(pool.map(work, [0]))


def of_thread_pool(name: str) -> Callable[[], Iterator[Submit]]:
    def make() -> Iterator[Submit]:
        ways: dict[str, Any] = {
            "apply": lambda pool, work: pool.apply(work),
            "apply_async": lambda pool, work: pool.apply_async(work).get(),
            "map": lambda pool, work: pool.map(work, [0])[0],
            "map_async": lambda pool, work: pool.map_async(work, [0]).get()[0],
            "starmap": lambda pool, work: pool.starmap(work, [(0,)])[0],
            "imap": lambda pool, work: next(pool.imap(work, [0])),
            "imap_unordered": lambda pool, work: next(pool.imap_unordered(work, [0])),
        }
        with multiprocessing.dummy.Pool(1) as pool:
            yield lambda work: ways[name](pool, work)

    make.__name__ = name
    return make


def in_loop() -> Iterator[Submit]:
    with asyncio.Runner() as runner:

        async def run(work: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(None, work)

        yield lambda work: runner.run(run(work))


def to_thread() -> Iterator[Submit]:
    with asyncio.Runner() as runner:
        yield lambda work: runner.run(asyncio.to_thread(work))


def to_thread_in_a_task() -> Iterator[Submit]:
    """The coroutine is made here, and its first step runs in a task."""
    with asyncio.Runner() as runner:

        async def run(coroutine: Any) -> Any:
            with devguard.unguarded():
                task = asyncio.create_task(coroutine)
            return await task

        def submit(work: Any) -> Any:
            async def main() -> Any:
                return await run(asyncio.to_thread(work))

            return runner.run(main())

        yield submit


def as_a_callback() -> Iterator[Submit]:
    """The callback is added here to a task that was submitted elsewhere."""
    with futures.ThreadPoolExecutor(1) as pool:

        def submit(work: Any) -> Any:
            go, done, got = threading.Event(), threading.Event(), []
            future = _submit_under_guard_3(pool, go.wait)

            def note(_: Any) -> None:
                try:
                    got.append(work())
                finally:
                    done.set()

            future.add_done_callback(note)
            go.set()
            done.wait()
            return got[0]

        yield submit


def _submit_under_guard_3(pool: Any, work: Any) -> Any:
    futures_made: list[Any] = []

    def submit() -> None:
        with guard(3):
            futures_made.append(pool.submit(work))

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    return futures_made[0]


def as_a_callback_of_a_pool() -> Iterator[Submit]:
    with ThreadPool(1) as pool:

        def submit(work: Any) -> Any:
            done, got = threading.Event(), []

            def note(_: Any) -> None:
                got.append(work())
                done.set()

            pool.apply_async(int, callback=note)
            done.wait()
            pool.apply_async(lambda: 1 / 0, error_callback=lambda error: note(error))
            while len(got) < 2:
                done.wait(0.01)
            assert got[0] == got[1]
            return got[0]

        yield submit


def as_an_iterable() -> Iterator[Submit]:
    with ThreadPool(1) as pool:

        def submit(work: Any) -> Any:
            def items() -> Iterator[Any]:
                yield work()

            def more() -> Iterator[Any]:
                yield work()

            first, second = (
                next(pool.imap(lambda item: item, items())),
                next(pool.imap_unordered(lambda item: item, more())),
            )
            assert first == second
            return first

        yield submit


MAKERS = [
    of_executor(futures.ThreadPoolExecutor), of_executor(Copied), of_executor(Bounded), mapped,
    *map(of_thread_pool, ["apply", "apply_async", "map", "map_async", "starmap", "imap", "imap_unordered"]),
    to_thread, to_thread_in_a_task, as_a_callback, as_a_callback_of_a_pool, as_an_iterable,
    *([in_loop] if hasattr(asyncio, "Runner") else []),
]  # fmt: skip
if not hasattr(asyncio, "Runner"):  # Python 3.10
    MAKERS = [make for make in MAKERS if make not in (to_thread, to_thread_in_a_task)]

SCOPES: list[Callable[[], Any]] = [
    lambda: guard(1),
    lambda: guard(2, mode="error"),
    lambda: guard(3, doors={"load": "observe"}),
    lambda: guard("cpu"),
    devguard.unguarded,
    lambda: devguard.remap(2),
]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def submit(request: pytest.FixtureRequest) -> Iterator[Submit]:
    yield from request.param()


def expected(scope: Any) -> tuple[Any, ...]:
    return tuple(on_a_fresh_thread(scope, everything))


class TestEveryWay:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("first", SCOPES[:3])
    def test_work_runs_in_the_scope_of_its_submitter_whoever_started_the_worker(self, submit, scope, first):
        wanted = expected(scope())
        with first():
            submit(everything)
        with scope():
            assert submit(everything) == wanted
            with guard(1):
                assert submit(everything) == expected(contextlib.nullcontext())
        assert submit(everything) == (0, "None", ["repair"] * 3, False, 0)

    def test_work_from_outside_every_scope_is_not_moved(self, submit):
        data = pickle.dumps(torch.ones(4).to("cuda:0"))
        with guard(1):
            assert submit(lambda *_: str(pickle.loads(data).device)) == "cuda:1"
        assert submit(lambda *_: str(pickle.loads(data).device)) == "cuda:0"

    def test_a_worker_from_before_the_first_guard_runs_work_in_its_scope(self, submit):
        submit(seen)
        with guard(2):
            assert submit(seen) == (2, "cuda:2")

    def test_work_leaves_nothing_behind(self, submit):
        def leave_a_scope(*_: Any) -> None:
            guard(3).__enter__()
            torch.cuda.set_device(2)

        before = submit(everything)
        for scope in SCOPES:
            with scope():
                submit(leave_a_scope)
        assert submit(everything) == before


POOLS: list[Any] = [futures.ThreadPoolExecutor, ThreadPool, multiprocessing.dummy.Pool, Copied]


def run_on(pool: Any, work: Any) -> Any:
    return pool.apply(work) if hasattr(pool, "apply") else pool.submit(work).result()


@pytest.mark.parametrize("kind", POOLS)
class TestInitializers:
    def test_an_initializer_runs_in_the_scope_of_the_code_that_makes_the_pool(self, kind):
        got: list[Any] = []
        with guard(1), kind(1, initializer=lambda: got.append(everything())) as pool:
            wanted = everything()
            with guard(2):
                run_on(pool, int)
        assert got == [wanted]
        assert [s for s in devguard.strays() if s.target != "cuda:2"] == []

    def test_it_does_so_whoever_starts_the_worker(self, kind):
        got: list[Any] = []
        with guard(3):
            pool = kind(1, initializer=lambda mark: got.append((mark, seen())), initargs=("x",))
        with pool:
            assert run_on(pool, seen) == (0, "None")
        assert got == [("x", (3, "cuda:3"))]

    def test_the_device_that_it_selects_is_that_of_the_worker(self, kind):
        def choose() -> None:
            torch.cuda.set_device(2)

        for scope in (guard(1), guard(2), guard(3, mode="error")):
            with scope:
                pool = kind(1, initializer=choose)
            with pool:
                assert run_on(pool, seen) == (2, "None")
                with guard(1):
                    assert run_on(pool, seen) == (1, "cuda:1")
                assert run_on(pool, seen) == (2, "None")
        assert {stray.door for stray in devguard.strays()} == {"threads"}

    def test_the_scope_that_it_enters_is_that_of_the_worker(self, kind):
        with guard(1):
            pool = kind(1, initializer=guard(2).__enter__)
        with pool:
            assert run_on(pool, seen) == (2, "cuda:2")
            with guard(3):
                assert run_on(pool, seen) == (3, "cuda:3")
            assert run_on(pool, seen) == (2, "cuda:2")

    def test_the_modes_of_the_worker_do_not_hold_for_a_task(self, kind):
        with kind(1, initializer=guard(2, doors={"load": "off"}).__enter__) as pool, guard(1):
            assert run_on(pool, everything) == expected(contextlib.nullcontext())


def test_an_initializer_that_fails_fails_as_without_devguard():
    def fail() -> None:
        raise ZeroDivisionError

    with guard(1), futures.ThreadPoolExecutor(1, initializer=fail) as pool, pytest.raises(futures.BrokenExecutor):
        pool.submit(seen).result()


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_that_is_made_in_a_scope_keeps_nothing_of_it(kind):
    data = pickle.dumps(torch.ones(4).to("cuda:0"))
    with guard(1):
        pool = kind(2)
        run_on(pool, seen)
    with pool:
        for _ in range(4):
            assert run_on(pool, seen) == (0, "None")
            assert run_on(pool, lambda: str(pickle.loads(data).device)) == "cuda:0"


@pytest.mark.parametrize("kind", POOLS)
def test_a_task_keeps_the_scope_that_was_left_before_it_ran(kind):
    go = threading.Event()
    with kind(1) as pool:
        with guard(1):
            if hasattr(pool, "apply_async"):
                pool.apply_async(go.wait)
                waiting = pool.apply_async(seen)
            else:
                pool.submit(go.wait)
                waiting = pool.submit(seen)
        go.set()
        assert (waiting.get() if hasattr(waiting, "get") else waiting.result()) == (1, "cuda:1")


def test_a_callback_without_a_scope_has_none_of_the_task():
    got: list[Any] = []
    go, done = threading.Event(), threading.Event()
    with futures.ThreadPoolExecutor(1) as pool:
        with guard(1):
            future = pool.submit(go.wait)
        future.add_done_callback(lambda _: (got.append(seen()), done.set()))
        go.set()
        done.wait()
    assert got == [(0, "None")]


def test_a_callback_of_a_future_that_is_done_runs_at_once_in_its_scope():
    got: list[Any] = []
    with futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(int)
        future.result()
        with guard(1):
            future.add_done_callback(lambda _: got.append(everything()))
            assert got == [everything()]


def test_a_callback_of_a_process_pool_runs_in_its_scope():
    got: list[Any] = []
    done = threading.Event()
    with futures.ProcessPoolExecutor(1) as pool:
        with guard("cpu"):
            pool.submit(int).result()
        with guard(2):
            pool.submit(int).add_done_callback(lambda _: (got.append(seen()), done.set()))
        done.wait()
    assert got == [(2, "cuda:2")]


def test_to_thread_keeps_its_kind_and_passes_arguments():
    with guard(1):
        assert asyncio.to_thread is asyncio.threads.to_thread or asyncio.to_thread.__wrapped__
        assert asyncio.iscoroutinefunction(asyncio.to_thread) if sys.version_info < (3, 14) else True
        made = asyncio.to_thread(int)
        assert inspect.iscoroutine(made)
        made.close()
        assert asyncio.run(asyncio.to_thread(dict, func=1, original=2)) == {"func": 1, "original": 2}


def test_a_finished_task_and_its_arguments_are_freed():
    class Big:
        pass

    with guard(1), futures.ThreadPoolExecutor(1) as pool:
        big = Big()
        gone = weakref.ref(big)
        pool.submit(id, big).result()
        del big
        pool.submit(int).result()
        assert gone() is None


class TestTheCallSiteOfWorkWithoutUserCode:
    """``run_in_executor(None, torch.load, path)``: the stray is recorded at the line that submits it."""

    @staticmethod
    def check(line: int, count: int = 1) -> None:
        strays = [stray for stray in devguard.strays() if stray.door == "load"]
        assert [(stray.site.file, stray.site.line, stray.count) for stray in strays if stray.site] == [
            (__file__, line, count)
        ]
        assert len(strays) == 1

    @pytest.fixture
    def path(self, tmp_path) -> str:
        path = str(tmp_path / "tensor.pt")
        torch.save(torch.ones(4).to("cuda:0"), path)
        return path

    @pytest.fixture(params=["guard", "install"])
    def owning(self, request: pytest.FixtureRequest) -> Iterator[None]:
        if request.param == "install":
            devguard.install(device=1)
            yield
        else:
            with guard(1):
                yield

    def test_run_in_executor(self, path, owning):
        async def main() -> int:
            loop = asyncio.get_running_loop()
            loaded = await loop.run_in_executor(None, torch.load, path)
            line = sys._getframe().f_lineno - 1
            assert str(loaded.device) == "cuda:1"
            return line

        self.check(asyncio.run(main()))

    def test_to_thread_in_a_task(self, path, owning):
        async def main() -> int:
            both = [asyncio.to_thread(torch.load, path) for _ in range(2)]
            line = sys._getframe().f_lineno - 1
            await asyncio.gather(*both)
            return line

        self.check(asyncio.run(main()), 2)

    def test_an_executor(self, path, owning):
        with futures.ThreadPoolExecutor(1) as pool:
            pool.submit(torch.load, path).result()
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_an_executor_with_an_initializer(self, path, owning):
        with futures.ThreadPoolExecutor(1, initializer=int) as pool:
            pool.submit(torch.load, path).result()
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_partial_objects(self, path, owning):
        with futures.ThreadPoolExecutor(1) as pool:
            pool.submit(functools.partial(torch.load, path)).result()
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_functions_of_c(self, owning):
        data = pickle.dumps(torch.ones(4).to("cuda:0"))
        with futures.ThreadPoolExecutor(1) as pool:
            pool.submit(pickle.loads, data).result()
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_bound_methods_of_c(self, owning):
        data = pickle.dumps(torch.ones(4).to("cuda:0"))
        with ThreadPool(1) as pool:
            pool.apply(pickle.Unpickler(io.BytesIO(data)).load)
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_map(self, path, owning):
        with futures.ThreadPoolExecutor(1) as pool:
            list(pool.map(torch.load, [path] * 3))
            line = sys._getframe().f_lineno - 1
        self.check(line, 3)

    @pytest.mark.parametrize("name", ["map", "imap", "imap_unordered"])
    def test_the_methods_of_a_thread_pool(self, path, owning, name):
        with ThreadPool(1) as pool:
            list(getattr(pool, name)(torch.load, [path] * 3))
            line = sys._getframe().f_lineno - 1
        self.check(line, 3)

    def test_starmap(self, path, owning):
        with ThreadPool(1) as pool:
            pool.starmap(torch.load, [(path,)])
            line = sys._getframe().f_lineno - 1
        self.check(line)

    def test_threads(self, path, owning):
        thread = threading.Thread(target=torch.load, args=(path,))
        thread.start()
        line = sys._getframe().f_lineno - 1
        thread.join()
        self.check(line)

    def test_timers(self, path, owning):
        thread = threading.Timer(0, torch.load, [path])
        thread.start()
        line = sys._getframe().f_lineno - 1
        thread.join()
        self.check(line)

    def test_two_lines_of_one_pool_are_two_call_sites(self, path, owning):
        lines = set()
        with futures.ThreadPoolExecutor(1) as pool:
            for _ in range(3):
                pool.submit(torch.load, path).result()
                lines.add(sys._getframe().f_lineno - 1)
                pool.submit(torch.load, path).result()
                lines.add(sys._getframe().f_lineno - 1)
        strays = [stray for stray in devguard.strays() if stray.door == "load"]
        assert {(stray.site.line, stray.count) for stray in strays if stray.site} == {(line, 3) for line in lines}

    def test_two_lines_that_call_through_a_library_are_two_call_sites(self, path, owning):
        with futures.ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                list(pool.map(torch.load, [path]))
                list(pool.map(torch.load, [path]))
        assert [stray.count for stray in devguard.strays() if stray.door == "load"] == [2, 2]

    def test_work_of_the_user_keeps_its_own_line(self, path, owning):
        def work() -> int:
            torch.load(path)
            return sys._getframe().f_lineno - 1

        with futures.ThreadPoolExecutor(1) as pool:
            line = pool.submit(work).result()
        self.check(line)
