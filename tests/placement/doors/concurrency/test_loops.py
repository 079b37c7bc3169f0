"""Threads that run an event loop or a server: work handed to them has the scopes of its submitter, or none."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import socket
import socketserver
import sys
import threading
from asyncio import run_coroutine_threadsafe as early_copy
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import anyio.from_thread
import fsspec.asyn
import pytest
import torch

import devguard
from devguard import guard
from devguard.ownership.stack import local
from tests.helpers.handed_work import check_restored
from tests.helpers.programs import run_child

OUTSIDE = (0, "None", "cuda:0")


def within(index: int) -> tuple[int, str, str]:
    return index, f"cuda:{index}", f"cuda:{index}"


@pytest.fixture(scope="module")
def data() -> bytes:
    return pickle.dumps(torch.ones(4).to("cuda:0"))


@pytest.fixture
def seen(data) -> Callable[[], tuple[int, str, str]]:
    return lambda: (torch.cuda.current_device(), str(devguard.owner()), str(pickle.loads(data).device))


def _stopping(loop: Any, thread: Any) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.result() if isinstance(thread, futures.Future) else thread.join()
    loop.close()


class Looping:
    """A loop that runs on a thread of its own, which starts at the first work."""

    def __init__(self) -> None:
        self.loop = self.make()
        self.closing = contextlib.ExitStack()
        self.runs = False

    make: Callable[[], Any] = staticmethod(asyncio.new_event_loop)

    def start(self) -> None:
        thread = threading.Thread(target=self.loop.run_forever)
        thread.start()
        self.closing.callback(_stopping, self.loop, thread)

    def submit(self, work: Callable[[], Any]) -> Any:
        if not self.runs:
            self.start()
            self.runs = True
        return self.hand_over(work)

    async def step(self, work: Callable[[], Any]) -> Any:
        before = work()
        await asyncio.sleep(0)
        assert work() == before
        return before

    def hand_over(self, work: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(self.step(work), self.loop).result(20)


class EarlyCopy(Looping):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        return early_copy(self.step(work), self.loop).result(20)


class Callback(Looping):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        future: futures.Future[Any] = futures.Future()
        self.loop.call_soon_threadsafe(functools.partial(self.run, future), work)
        return future.result(20)

    @staticmethod
    def run(future: Any, work: Callable[[], Any]) -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - the submitter raises it
            future.set_exception(error)


class TaskOfCoroutine(Looping):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        done: futures.Future[Any] = futures.Future()

        async def step() -> None:
            try:
                done.set_result(await self.step(work))
            except Exception as error:  # noqa: BLE001 - the submitter raises it
                done.set_exception(error)

        self.loop.call_soon_threadsafe(self.loop.create_task, step())
        return done.result(20)


class Child(Looping):
    """The work runs in a task of the loop's own, which has the scopes of the thread."""

    def hand_over(self, work: Callable[[], Any]) -> Any:
        async def step() -> Any:
            return await asyncio.create_task(self.step(work))

        return asyncio.run_coroutine_threadsafe(step(), self.loop).result(20)


class InFunction(Looping):
    def start(self) -> None:
        def run() -> None:
            self.loop.run_forever()

        thread = threading.Thread(target=run)
        thread.start()
        self.closing.callback(_stopping, self.loop, thread)


class InPool(Looping):
    def start(self) -> None:
        pool = self.closing.enter_context(futures.ThreadPoolExecutor(1))
        self.closing.callback(_stopping, self.loop, pool.submit(self.loop.run_forever))


class Uvloop(Looping):
    @staticmethod
    def make() -> Any:
        return pytest.importorskip("uvloop").new_event_loop()


class UvloopCallback(Callback, Uvloop): ...


class UntilComplete(Looping):
    """The thread runs a coroutine of the library's own until it is stopped."""

    def start(self) -> None:
        started = threading.Event()
        end = asyncio.Event()

        async def main() -> None:
            started.set()
            await end.wait()

        def stop() -> None:
            self.loop.call_soon_threadsafe(end.set)
            thread.join()
            self.loop.close()

        thread = threading.Thread(target=lambda: self.loop.run_until_complete(main()))
        thread.start()
        started.wait()
        self.closing.callback(stop)


class Portal(Looping):
    make = staticmethod(lambda: None)

    def start(self) -> None:
        self.portal = self.closing.enter_context(anyio.from_thread.start_blocking_portal())

    def hand_over(self, work: Callable[[], Any]) -> Any:
        return self.portal.call(self.step, work)


class PortalCall(Portal):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        return self.portal.call(work)


class PortalTask(Portal):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        return self.portal.start_task_soon(self.step, work).result(20)


class PortalChild(Portal):
    def hand_over(self, work: Callable[[], Any]) -> Any:
        async def step() -> Any:
            return await asyncio.create_task(self.step(work))

        return self.portal.call(step)


HANDING = [
    Looping, EarlyCopy, Callback, TaskOfCoroutine, InFunction, InPool, Uvloop, UvloopCallback, UntilComplete, Portal,
    PortalCall, PortalTask,
]  # fmt: skip


@pytest.fixture(params=HANDING)
def loop(request) -> Iterator[Looping]:
    made = request.param()
    with made.closing:
        yield made


class TestEveryWay:
    def test_work_has_the_scope_of_its_submitter_whoever_started_the_loop(self, loop, seen):
        with guard(1):
            assert loop.submit(seen) == within(1)
        assert loop.submit(seen) == loop.submit(seen) == OUTSIDE
        with guard(2):
            assert loop.submit(seen) == within(2)
            with guard(3):
                assert loop.submit(seen) == within(3)
        assert loop.submit(seen) == OUTSIDE

    def test_work_from_a_thread_outside_every_scope_has_none_while_the_loops_is_entered(self, loop, seen):
        with guard(0):
            pass  # opens the doors
        with futures.ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            got: list[Any] = []
            go, done = threading.Event(), threading.Event()

            def submit() -> None:
                go.wait()
                got.append(loop.submit(seen))
                done.set()

            thread = threading.Thread(target=submit)
            thread.start()
            with guard(1):
                loop.submit(seen)
                go.set()
                done.wait()
                assert loop.submit(seen) == within(1)
            thread.join()
        assert got == [OUTSIDE]

    def test_it_falls_back_to_the_owner_of_the_process(self, loop, seen):
        devguard.install(device=3)
        with guard(1):
            loop.submit(seen)
        assert loop.submit(seen) == within(3)

    def test_a_loop_from_before_the_first_guard_runs_work_in_its_scope(self, loop, seen):
        loop.submit(int)
        with guard(2):
            assert loop.submit(seen) == within(2)
        assert loop.submit(seen) == OUTSIDE

    def test_work_leaves_nothing_behind(self, loop, seen):
        def leave_a_scope() -> None:
            guard(3).__enter__()

        with guard(1):
            with contextlib.suppress(AssertionError):  # a step finds the scope of the step before
                loop.submit(leave_a_scope)
            assert loop.submit(seen) == within(1)
        assert loop.submit(seen) == OUTSIDE
        assert loop.submit(lambda: len(local.stack)) == 0

    def test_exceptions_pass_through(self, loop, seen):
        with guard(1):
            loop.submit(seen)
            with pytest.raises(ZeroDivisionError):
                loop.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loop.submit(lambda: 1 // 0)
        assert loop.submit(seen) == OUTSIDE

    def test_after_uninstall_work_has_no_scope(self, loop):
        with guard(1):
            loop.submit(int)
        devguard.uninstall()
        assert loop.submit(lambda: torch.cuda.current_device()) in (0, 1)
        assert devguard.owner() is None


class TestTheThreadItself:
    @pytest.mark.parametrize("kind", [Child, PortalChild])
    def test_a_loop_that_serves_others_falls_back(self, kind, seen):
        loop = kind()
        with loop.closing:
            with guard(1):
                assert loop.submit(seen) == within(1)
            assert loop.submit(seen) == OUTSIDE
            with guard(2):
                loop.submit(seen)
            assert loop.submit(seen) == OUTSIDE
            assert len(devguard.status()["doors"]["threads"]["fallen_back"]) == 1

    @pytest.mark.parametrize("run", [asyncio.run, anyio.run, None])
    def test_a_coroutine_that_a_thread_runs_to_its_end_keeps_its_scope(self, run, seen):
        left = threading.Event()
        got: list[Any] = []

        async def main() -> None:
            while not left.is_set():
                await asyncio.sleep(0.001)
            got.append(seen())
            got.append(await asyncio.create_task(step()))

        async def step() -> Any:
            await asyncio.sleep(0)
            return seen()

        with guard(1):
            if run is anyio.run:
                thread = threading.Thread(target=run, args=(main,))
            else:
                thread = threading.Thread(target=run or (lambda: asyncio.run(main())), args=(main(),) if run else ())
            thread.start()
        left.set()
        thread.join()
        assert got == [within(1)] * 2

    def test_connections_of_a_loop_that_serves_others_have_no_earlier_scope(self, seen):
        loop = asyncio.new_event_loop()

        async def answer(reader: Any, writer: Any) -> None:
            writer.write(repr(seen()).encode())
            writer.close()

        server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
        address = server.sockets[0].getsockname()
        with guard(1):
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            assert _ask(address) == repr(within(1))
        assert _ask(address) == repr(OUTSIDE)
        loop.call_soon_threadsafe(server.close)
        _stopping(loop, thread)

    @pytest.mark.parametrize("kind", [socketserver.TCPServer, socketserver.ThreadingTCPServer])
    def test_requests_of_a_server_have_no_earlier_scope(self, kind, seen):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(repr(seen()).encode())

        with kind(("127.0.0.1", 0), Handler) as server:
            with guard(1):
                thread = threading.Thread(target=server.serve_forever, args=(0.01,))
                thread.start()
                assert _ask(server.server_address) == repr(within(1))
            assert _ask(server.server_address) == repr(OUTSIDE)
            server.shutdown()
            thread.join()

    def test_a_guard_around_the_loop_holds_for_its_own_work(self, seen):
        got: list[Any] = []
        loop = asyncio.new_event_loop()

        def run() -> None:
            with guard(2):
                loop.call_soon(lambda: got.append(seen()))
                loop.call_soon(loop.stop)
                loop.run_forever()

        with guard(1):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        loop.close()
        assert got == [within(2)]


def _ask(address: Any) -> str:
    with socket.create_connection(address[:2]) as connection:
        return b"".join(iter(lambda: connection.recv(1000), b"")).decode()


def test_the_loop_of_fsspec_runs_work_in_the_scope_of_its_submitter(seen):
    async def step() -> Any:
        await asyncio.sleep(0)
        return seen()

    with guard(1):
        assert fsspec.asyn.sync(fsspec.asyn.get_loop(), step) == within(1)
    assert fsspec.asyn.sync(fsspec.asyn.get_loop(), step) == OUTSIDE
    with guard(2):
        assert fsspec.asyn.sync(fsspec.asyn.get_loop(), step) == within(2)


class Plain:
    def __init__(self, *values: Any) -> None:
        self.values = values

    def __await__(self) -> Any:
        return iter(self.values)


class Legacy:
    """An awaitable whose iterator has `send`, and no `throw`."""

    def __await__(self) -> Any:
        return self

    def __iter__(self) -> Any:
        return self

    def send(self, value: Any) -> Any:
        return self.__next__()

    def __next__(self) -> Any:
        raise StopIteration(7)


@pytest.mark.parametrize(("awaitable", "result"), [(Plain(), None), (Plain(None, None), None), (Legacy(), 7)])
@pytest.mark.parametrize("scope", [contextlib.nullcontext, lambda: guard(1)])
def test_a_portal_awaits_whatever_can_be_awaited(awaitable, result, scope):
    with guard(0):
        pass
    with anyio.from_thread.start_blocking_portal() as portal, scope():
        assert portal.call(lambda: awaitable) == result


def test_an_awaitable_of_plain_iterators_can_be_cancelled():
    class Waiting:
        def __await__(self) -> Any:
            return iter([None] * 10**9)

    with anyio.from_thread.start_blocking_portal() as portal, guard(1):
        future = portal.start_task_soon(Waiting)
        future.cancel()
        with pytest.raises(futures.CancelledError):
            future.result()


class TestWhatTheLoopSees:
    def test_callbacks_of_the_standard_library_stay_as_they_are(self):
        loop = asyncio.new_event_loop()
        callback = asyncio.Event().set
        with guard(1):
            handle = loop.call_soon_threadsafe(callback)
            stop = loop.call_soon_threadsafe(loop.stop)
            done = loop.create_future()
            result = loop.call_soon_threadsafe(done.set_result, None)
        assert handle._callback == callback
        assert (stop._callback, result._callback) == (loop.stop, done.set_result)
        loop.run_forever()
        loop.close()

    def test_a_callback_from_the_loops_own_thread_stays_as_it_is(self):
        def callback() -> None: ...

        async def main() -> Any:
            return asyncio.get_running_loop().call_soon_threadsafe(callback)._callback

        with guard(1):
            assert asyncio.run(main()) is callback

    def test_a_closed_loop_refuses_work_as_without_devguard(self):
        loop = asyncio.new_event_loop()
        loop.close()

        async def step() -> None: ...

        coroutine = step()
        with guard(1), pytest.raises(RuntimeError, match="closed"):
            asyncio.run_coroutine_threadsafe(coroutine, loop)
        coroutine.close()

    def test_what_is_no_callback_is_refused_as_without_devguard(self):
        loop = asyncio.new_event_loop()
        loop.set_debug(True)

        async def step() -> None: ...

        with guard(1), pytest.raises(TypeError):
            loop.call_soon_threadsafe(step)
        with guard(1), pytest.raises(TypeError):
            loop.call_soon_threadsafe(3)
        loop.close()

    def test_the_context_of_a_callback_is_kept(self):
        import contextvars

        variable = contextvars.ContextVar("variable", default=0)
        context = contextvars.copy_context()
        context.run(variable.set, 5)
        loop = Looping()
        got: futures.Future[int] = futures.Future()
        with loop.closing, guard(1):
            loop.submit(int)
            loop.loop.call_soon_threadsafe(lambda: got.set_result(variable.get()), context=context)
            assert got.result(20) == 5

    def test_a_coroutine_that_is_cancelled_ends_and_leaves_no_scope(self, seen):
        async def forever() -> None:
            await asyncio.sleep(3600)

        loop = Looping()
        with loop.closing, guard(1):
            loop.submit(int)
            future = asyncio.run_coroutine_threadsafe(forever(), loop.loop)
            future.cancel()
            assert loop.submit(lambda: len(local.stack)) in (1, 2)
            with guard(2):
                assert loop.submit(seen) == within(2)


def test_uninstall_restores_the_functions():
    check_restored(PATCHED)


PATCHED = [
    (asyncio.BaseEventLoop, "call_soon_threadsafe"),
    (asyncio.BaseEventLoop, "run_forever"),
    (socketserver.BaseServer, "_handle_request_noblock"),
]


def test_at_the_end_of_python_a_portal_that_nobody_closed_fails_in_no_function_of_devguard():
    code = (
        "import anyio.from_thread\n"
        "def note(failure, print=print):\n"
        "    trace = failure.exc_traceback\n"
        "    while trace.tb_next: trace = trace.tb_next\n"
        "    print('failed in', trace.tb_frame.f_code.co_filename)\n"
        "sys.unraisablehook = note\n"
        "with devguard.guard(1):\n"
        "    manager = anyio.from_thread.start_blocking_portal()\n"
        "    print(manager.__enter__().call(torch.cuda.current_device))"
    )
    first, *failed = run_child(code).splitlines()
    assert first == "1"
    assert not [line for line in failed if "devguard" in line]


def test_eventlets_pool_of_threads_runs_work_in_the_scope_of_its_submitter():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import eventlet.tpool\n"
        "def seen(*_): return torch.cuda.current_device(), str(devguard.owner())\n"
        "class Kind:\n"
        "    def seen(self): return seen()\n"
        "def ways(): return [eventlet.tpool.execute(seen), eventlet.tpool.Proxy(Kind()).seen()]\n"
        "for index in (1, 2):\n"
        "    with devguard.guard(index):\n"
        "        got = ways()\n"
        "    assert got == [(index, f'cuda:{index}')] * 2, got\n"
        "assert ways() == [(0, 'None')] * 2\n"
        "print(devguard.status()['doors']['threads']['failures'])"
    )
    assert run_child(code) == "[]"
    assert "eventlet" not in sys.modules
