"""The door ``threads`` on simulated GPUs: the device and the scopes of threads and of the tasks of pools."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import functools
import gc
import os
import pickle
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing.pool import Pool, ThreadPool
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors.concurrency import thread_plan, thread_run
from devguard.doors.concurrency import threads as door
from devguard.ownership.stack import local
from devguard.reporting.journal import journal
from devguard.support.patching import DoorError
from tests.helpers.programs import run_child

current = torch.cuda.current_device
works: list[Callable[[], Any]] = []  # called by `seen` first


def seen() -> tuple[int, str]:
    """Return the current device and the owner of this thread."""
    for work in works:
        work()
    return current(), str(devguard.owner())


@pytest.fixture
def on_device_0() -> Iterator[None]:
    """Let `seen` allocate on the current device."""
    works.append(lambda: torch.ones(1, device="cuda"))
    yield
    works.clear()


class Overriding(threading.Thread):
    result: Any = None

    def run(self) -> None:
        self.result = seen()


def in_thread(work: Callable[[], Any] = seen) -> Any:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(work()))
    thread.start()
    thread.join()
    return got[0] if got else None


def subclass() -> Any:
    thread = Overriding()
    thread.start()
    thread.join()
    return thread.result


def timer() -> Any:
    got: list[Any] = []
    thread = threading.Timer(0, lambda: got.append(seen()))
    thread.start()
    thread.join()
    return got[0]


def submit() -> Any:
    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(seen).result()


def executor_map() -> Any:
    with futures.ThreadPoolExecutor(2) as pool:
        (result,) = set(pool.map(lambda _: seen(), range(8)))
        return result


async def _in_executor() -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, seen)


def to_thread() -> Any:
    return asyncio.run(asyncio.to_thread(seen))


def run_in_executor() -> Any:
    return asyncio.run(_in_executor())


def pool_apply() -> Any:
    with ThreadPool(1) as pool:
        return pool.apply(seen)


def pool_map() -> Any:
    with ThreadPool(2) as pool:
        (result,) = set(pool.map(lambda _: seen(), range(8)))
        return result


def pool_imap() -> Any:
    with ThreadPool(2) as pool:
        ordered, unordered = pool.imap(lambda _: seen(), range(8)), pool.imap_unordered(lambda _: seen(), range(8), 4)
        (result,) = {*ordered, *unordered}
        return result


def nested() -> Any:
    return in_thread(lambda: in_thread(seen))


WAYS = [
    in_thread, subclass, timer, submit, executor_map, to_thread, run_in_executor, pool_apply, pool_map, pool_imap,
    nested,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_unguarded_work_starts_on_device_0(self, way):
        torch.cuda.set_device(1)
        assert way() == (0, "None")

    def test_guarded_work_starts_on_the_owner(self, way):
        with guard(1):
            assert way() == (1, "cuda:1")
            assert current() == 1
        strays = devguard.strays()
        assert {(s.door, s.source, s.target, s.action) for s in strays} == {("threads", "cuda:0", "cuda:1", "placed")}
        assert {s.site.file for s in strays} == {__file__}

    def test_work_that_starts_on_the_owner_anyway_is_no_stray(self, way):
        with guard(0, mode="error"):
            assert way() == (0, "cuda:0")
        assert devguard.strays() == ()

    def test_the_cpu_owner_and_unguarded_are_inherited(self, way):
        with guard("cpu", mode="error"):
            assert way() == (0, "cpu")
        with guard(1), devguard.unguarded():
            assert way() == (0, "None")
        assert devguard.strays() == ()

    def test_observe_records_work_on_another_device_and_leaves_it_there(self, way, on_device_0):
        with guard(1, mode="observe"):
            assert way() == (0, "cuda:1")
        strays = devguard.strays()
        assert {(s.door, s.source, s.action) for s in strays} == {("threads", "cuda:0", "observed")}
        assert {s.site.file for s in strays} == {__file__}

    def test_warn_warns_and_leaves_the_work_there(self, way, on_device_0):
        with guard(1, doors={"threads": "warn"}), pytest.warns(devguard.StrayDeviceWarning, match="cuda:0"):
            assert way() == (0, "cuda:1")

    @pytest.mark.parametrize("mode", ["observe", "warn"])
    def test_work_that_uses_no_gpu_is_no_stray(self, way, mode):
        with guard(1, mode=mode), devguard.no_strays():
            assert way() == (0, "cuda:1")
        assert devguard.strays() == ()

    def test_error_mode_places_the_work_and_no_strays_does_not_raise(self, way):
        with guard(1, mode="error"), devguard.no_strays():
            assert way() == (1, "cuda:1")
        assert {s.action for s in devguard.strays()} == {"placed"}

    def test_error_mode_set_for_this_door_refuses_at_the_start(self, way):
        with guard(1, doors={"threads": "error"}), pytest.raises(devguard.StrayDeviceError, match="owns cuda:1"):
            way()
        assert {s.action for s in devguard.strays()} == {"refused"}

    def test_off_leaves_the_work_on_device_0(self, way):
        with guard(1, doors={"threads": "off"}):
            assert way() == (0, "None")
        with guard(1, mode="off"):
            assert way() == (0, "cuda:1")  # the scope is inherited for the sake of its mode
        assert devguard.strays() == ()

    def test_after_uninstall_work_starts_on_device_0(self, way):
        with guard(1):
            devguard.uninstall()
            assert way() == (0, "None")

    def test_the_owner_of_the_process_applies_outside_every_scope(self, way):
        devguard.install(device=2)
        assert way()[0] == 2
        with guard(3):
            assert way() == (3, "cuda:3")


def test_the_call_site_is_the_line_that_starts_it():
    with guard(1), futures.ThreadPoolExecutor(1) as pool:
        thread = threading.Thread(target=seen)
        thread.start(), pool.submit(seen).result(), asyncio.run(asyncio.to_thread(seen))
        line = sys._getframe().f_lineno - 1
        thread.join()
    (stray,) = devguard.strays()
    assert (stray.site.line, stray.count) == (line, 3)


class TestTheSameLineAgain:
    """A repeated start at one line reuses its plan unless a condition of the plan has changed."""

    def test_each_start_counts_and_follows_the_scope(self):
        with guard(1):
            assert [in_thread() for _ in range(3)] == [(1, "cuda:1")] * 3
            with guard(2):
                assert [in_thread() for _ in range(2)] == [(2, "cuda:2")] * 2
            with devguard.unguarded():
                assert in_thread() == (0, "None")
            with guard("cpu"):
                assert in_thread() == (0, "cpu")
            assert in_thread() == (1, "cuda:1")
        assert in_thread() == (0, "None")
        assert sorted((s.target, s.count, s.site.function) for s in devguard.strays()) == [
            ("cuda:1", 4, "in_thread"),
            ("cuda:2", 2, "in_thread"),
        ]

    def test_after_the_journal_is_cleared_counts_start_at_zero(self):
        with guard(1):
            in_thread(), in_thread()
            journal.clear()
            in_thread()
        assert [s.count for s in devguard.strays()] == [1]

    def test_a_device_that_is_allowed_later_is_left_alone(self):
        with guard(1):
            in_thread(), in_thread()
            devguard.allow("cuda:0")
            assert in_thread() == (0, "cuda:1")
        assert [s.count for s in devguard.strays()] == [2]

    def test_threads_of_every_kind_can_be_started_at_one_line(self):
        works = [threading.main_thread, seen, functools.partial(seen), Overriding().run, threading.main_thread]
        threads = [threading.Thread(target=work) for work in works] + [threading.Timer(0, work) for work in works]
        with guard(1):
            for thread in (*threads, Overriding(), threading.Thread()):
                thread.start()
                thread.join()
        assert [s.count for s in devguard.strays()] == [7]

    def test_of_threads_started_at_one_line_only_those_that_run_user_code_are_recorded(self):
        with guard(1):
            for work in [seen] * 3 + [threading.main_thread] * 5 + [seen]:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
        assert [s.count for s in devguard.strays()] == [4]

    def test_a_thread_started_from_c_has_no_call_site(self):
        got: list[Any] = []
        done = threading.Event()
        thread = threading.Thread(target=lambda: (got.append(current()), done.set()))
        devguard.install(device=1)
        _thread.start_new_thread(thread.start, ())  # C code calls `start`: there is no Python frame below
        done.wait()
        thread.join()
        assert got == [1]
        (stray,) = devguard.strays()
        assert stray.site is None

    def test_a_target_whose_attributes_raise_still_runs(self):
        class Work:
            __name__ = "work"

            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(name)

            def __call__(self) -> None:
                got.append(current())

        got: list[int] = []
        with guard(1):
            thread = threading.Thread(target=Work())
            thread.start()
            thread.join()
        assert len(got) == 1

    def test_a_thread_whose_start_was_interrupted_still_runs_in_its_scopes(self, monkeypatch):
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        got: list[Any] = []
        go, done, bootstrap = threading.Event(), threading.Event(), threading.Thread._bootstrap
        monkeypatch.setattr(threading.Thread, "_bootstrap", lambda self: (go.wait(), bootstrap(self)))
        thread = threading.Thread(target=lambda: (got.append(seen()), done.set()))
        monkeypatch.setattr(thread._started, "wait", interrupted)
        with guard(1), pytest.raises(KeyboardInterrupt):
            thread.start()
        go.set()
        done.wait()
        thread.join()
        assert got == [(1, "cuda:1")]

    def test_a_thread_class_that_rejects_attributes_still_runs(self):
        class Closed(threading.Thread):
            def __setattr__(self, name: str, value: Any) -> None:
                if name == "_delete":
                    raise AttributeError(name)
                super().__setattr__(name, value)

        got: list[Any] = []
        for mode in ("observe", "repair"):
            with guard(1, mode=mode):
                thread = Closed(target=lambda: got.append(seen()))
                thread.start()
                thread.join()
            assert not thread.is_alive()
        assert got == [(0, "cuda:1"), (1, "cuda:1")]

    def test_a_thread_that_cannot_be_started_leaves_no_plan(self, monkeypatch):
        def none_left(*_: Any, **__: Any) -> None:
            raise RuntimeError("can't start new thread")

        with guard(1):
            for name in ("_start_new_thread", "_start_joinable_thread"):  # Python 3.13 has the second
                monkeypatch.setattr(threading, name, none_left, raising=False)
            with pytest.raises(RuntimeError, match="can't start"):
                in_thread()
        assert thread_plan.planned == {}


class TestThreads:
    def test_a_refused_thread_is_not_started(self):
        thread = Overriding()
        with guard(1, doors={"threads": "error"}), pytest.raises(devguard.StrayDeviceError):
            thread.start()
        assert thread.ident is None
        thread.start()
        thread.join()
        assert thread.result == (0, "None")

    def test_a_thread_takes_over_the_scopes_of_the_moment_it_is_started(self):
        thread = Overriding()
        with guard(2), guard(1):
            thread.start()
        thread.join()
        assert thread.result == (1, "cuda:1")

    def test_a_thread_can_outlive_the_scope_that_it_took_over(self):
        go, got = threading.Event(), []

        def work():
            go.wait()
            got.append(seen())
            with guard(3):
                got.append(seen())
            got.append(seen())

        with guard(1):
            thread = threading.Thread(target=work)
            thread.start()
        with guard(2):
            go.set()
            thread.join()
        assert got == [(1, "cuda:1"), (3, "cuda:3"), (1, "cuda:1")]

    def test_a_thread_cannot_leave_a_scope_that_it_took_over(self):
        scoped = guard(1)

        def leave() -> Any:
            with pytest.warns(RuntimeWarning, match="not entered it"):
                scoped.__exit__(None, None, None)
            return seen()

        with scoped:
            assert in_thread(leave) == (1, "cuda:1")

    def test_doors_act_on_a_thread_in_the_inherited_modes(self):
        data = pickle.dumps(torch.arange(8.0).to("cuda:0"))
        with guard(1):
            assert in_thread(lambda: pickle.loads(data).device.index) == 1
            with guard(1, doors={"load": "observe"}):
                assert in_thread(lambda: pickle.loads(data).device.index) == 0

    def test_a_context_is_bound_to_the_thread(self):
        code = (
            "import ctypes, threading\n"
            "def work():\n"
            "    context = ctypes.c_void_p()\n"
            "    ctypes.CDLL('libcuda.so.1').cuCtxGetCurrent(ctypes.byref(context))\n"
            "    print(bool(context.value), torch.ones(2, device='cuda').device, ctx())\n"
            "with devguard.guard(1):\n"
            "    t = threading.Thread(target=work); t.start(); t.join()"
        )
        assert run_child(code) == "True cuda:1 [1]"

    @pytest.mark.parametrize(
        "work",
        [guard(1)(seen), guard(1).bind(seen), functools.partial(guard(1)(seen))],
        ids=["decorated", "bound", "partial"],
    )
    def test_a_function_with_its_own_guard_is_no_stray(self, work):
        with guard(1, mode="error"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            with futures.ThreadPoolExecutor(1) as pool:
                assert pool.submit(work).result() == (1, "cuda:1")
        assert devguard.strays() == ()

    def test_threads_of_the_standard_library_are_placed_and_are_no_strays(self):
        with guard(1, mode="error"):
            thread = threading.Thread(target=threading.main_thread().is_alive)
            thread.start()
            thread.join()
        assert devguard.strays() == ()

    def test_a_finished_thread_is_freed_without_the_garbage_collector(self):
        def fail():
            raise ZeroDivisionError

        hook, threading.excepthook = threading.excepthook, lambda args: None
        gc.collect()
        gc.disable()
        try:
            for target in (seen, fail):
                with guard(1):
                    thread = threading.Thread(target=target)
                    thread.start()
                    thread.join()
                gone = weakref.ref(thread)
                del thread
                assert gone() is None
            with guard(1), futures.ThreadPoolExecutor(1) as pool:
                tensor = torch.ones(2)
                gone = weakref.ref(tensor)
                pool.submit(torch.add, tensor, 1).result()
                del tensor
                pool.submit(seen).result()
                assert gone() is None
        finally:
            gc.enable()
            threading.excepthook = hook
        assert thread_plan.planned == {}

    @pytest.mark.parametrize(
        "make", [Overriding, lambda: threading.Thread(target=seen), lambda: threading.Timer(0, seen)]
    )
    def test_starting_twice_is_pythons_error(self, make):
        with guard(1):
            thread = make()
            thread.start()
            thread.join()
            with pytest.raises(RuntimeError, match="once"):
                thread.start()

    @pytest.mark.parametrize(
        ("scope", "expected"), [(lambda: guard(1), (1, "cuda:1")), (contextlib.nullcontext, (0, "None"))]
    )
    @pytest.mark.parametrize("again", [1, 2])
    def test_starting_a_running_thread_again_changes_nothing(self, scope, expected, again):
        with guard(again):
            pass  # opens the doors
        go, got = threading.Event(), []
        thread = threading.Thread(target=lambda: (go.wait(), got.append(seen())))
        with scope():
            thread.start()
        with guard(again), pytest.raises(RuntimeError, match="once"):
            thread.start()
        go.set()
        thread.join()
        assert got == [expected]
        assert thread_plan.planned == {}

    def test_a_plan_left_by_a_dead_thread_is_not_used_for_a_new_one(self):
        thread = Overriding()
        thread_plan.planned[id(thread)] = thread_plan.Start((), 3)
        with guard(1):
            thread.start()
        thread.join()
        assert thread.result == (1, "cuda:1")
        assert thread_plan.planned == {}

    def test_a_thread_has_its_scopes_before_it_counts_as_started(self, monkeypatch):
        got: list[Any] = []
        thread = threading.Thread(target=seen)
        set_started = thread._started.set
        monkeypatch.setattr(thread._started, "set", lambda: (got.append(seen()), set_started()))
        with guard(1):
            thread.start()
        thread.join()
        assert got == [(1, "cuda:1")]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_child_forked_by_a_thread_keeps_the_scopes_of_that_thread(self):
        def fork() -> int:
            pid = os.fork()
            if pid == 0:
                os._exit(len(thread_plan.planned) + 10 * (len(local.stack) == 1))
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        with guard("cpu"):
            assert in_thread(fork) == 11

    def test_starting_without_init_is_pythons_error(self):
        with guard(1), pytest.raises(RuntimeError, match="__init__"):
            threading.Thread.__new__(threading.Thread).start()

    def test_an_error_inside_devguard_does_not_end_the_thread(self, monkeypatch):
        with guard(1):
            monkeypatch.setattr(thread_plan, "plan", lambda *args: 1 / 0)
            monkeypatch.setattr(thread_plan, "plan_worker", lambda *args: 1 / 0)
            assert {way() for way in WAYS} == {(0, "None")}
            assert devguard.status()["doors"]["threads"]["failures"][0] == "ZeroDivisionError: division by zero"
            monkeypatch.undo()
            monkeypatch.setattr(thread_run, "enter", lambda *args: 1 / 0)
            assert submit() == pool_map() == (0, "None")

    def test_a_device_that_cannot_be_set_does_not_end_the_thread(self, monkeypatch):
        monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: 1 / 0)
        from devguard.doors import table

        table.open_all()
        monkeypatch.undo()
        with guard(1):
            assert in_thread() == (0, "cuda:1")
        assert list(thread_plan.failures) == ["ZeroDivisionError: division by zero"]
        devguard.uninstall()

    def test_the_status_names_the_threads_from_before_the_door_opened(self):
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait, name="early")
        thread.start()
        with guard(1):
            row = devguard.status()["doors"]["threads"]
        stop.set()
        thread.join()
        assert row["threads_before"] == ["early"]
        assert "_thread.start_new_thread" in row["out_of_reach"]

    def test_a_device_change_by_a_library_is_judged_at_the_end_of_a_thread(self):
        with guard(1):
            in_thread(clobber)
        assert "set_device" in {stray.door for stray in devguard.strays()}
        assert threading.active_count() == 1


def clobber() -> None:
    library = {"__name__": "some_library.core"}
    exec(
        compile("import torch\ndef take(index):\n    torch.cuda.set_device(index)\n", "some_library.py", "exec"),
        library,
    )
    library["take"](2)


class TestEvidence:
    """Modes that leave threads alone judge a thread or a task by the context that is current at its end."""

    def test_the_call_site_is_the_line_that_starts_it(self, on_device_0):
        with guard(1, mode="observe"), futures.ThreadPoolExecutor(1) as executor, ThreadPool(1) as pool:
            thread = threading.Thread(target=seen)
            thread.start(), executor.submit(seen).result(), pool.apply(seen), asyncio.run(asyncio.to_thread(seen))
            line = sys._getframe().f_lineno - 1
            thread.join()
            (stray,) = devguard.strays()
        assert (stray.site.line, stray.count) == (line, 4)

    def test_a_thread_that_chooses_the_owner_is_no_stray(self):
        def work() -> Any:
            torch.cuda.set_device(1)
            return torch.ones(1, device="cuda").device.index

        with guard(1, mode="observe"), devguard.no_strays():
            assert in_thread(work) == 1

    def test_a_thread_that_names_the_owner_is_no_stray(self):
        code = (
            "with devguard.guard(1, mode='observe'):\n"
            "    t = threading.Thread(target=lambda: torch.ones(2, device='cuda:1')); t.start(); t.join()\n"
            "print(ctx(), devguard.strays())"
        )
        assert run_child("import threading\n" + code) == "[1] ()"

    def test_a_thread_on_a_device_that_this_process_has_owned_is_no_stray(self):
        code = (
            "import threading\n"
            "@devguard.guard(3)\n"
            "def inner(): torch.ones(2, device='cuda')\n"
            "with devguard.guard(1, mode='observe'):\n"
            "    t = threading.Thread(target=lambda: inner()); t.start(); t.join()\n"
            "print(ctx(), devguard.strays())"
        )
        assert run_child(code) == "[1, 3] ()"

    def test_a_task_is_recorded_only_after_its_worker_has_used_device_0(self, on_device_0):
        with guard(1, mode="observe"), futures.ThreadPoolExecutor(1) as executor:
            executor.submit(pow, 2, 3).result()
            assert devguard.strays() == ()
            executor.submit(seen).result()
            assert [stray.count for stray in devguard.strays()] == [1]
            works.clear()
            executor.submit(seen).result()  # device 0 is current on the worker now, so the task would run there
            assert sum(stray.count for stray in devguard.strays()) == 2

    def test_the_end_of_a_thread_is_judged_once_and_leaves_no_plan(self, on_device_0):
        with guard(1, mode="observe"):
            thread = threading.Thread(target=seen)
            thread.start()
            thread.join()
        assert [stray.count for stray in devguard.strays()] == [1]
        assert thread_plan.planned == {}

    @pytest.mark.filterwarnings("error")
    def test_a_warning_that_is_raised_at_the_end_does_not_break_the_thread(self, on_device_0):
        with guard(1, mode="warn"):
            assert in_thread() == (0, "cuda:1")
        assert [stray.action for stray in devguard.strays()] == ["warned"]


class TestPools:
    def test_each_task_runs_under_its_submitters_scope(self):
        with futures.ThreadPoolExecutor(1) as executor, ThreadPool(1) as pool:
            for index in (1, 2, 0, 3):
                with guard(index):
                    assert executor.submit(seen).result() == pool.apply(seen) == (index, f"cuda:{index}")
            assert executor.submit(seen).result() == pool.apply(seen) == (0, "None")

    def test_outside_every_scope_a_task_runs_on_the_device_of_the_initializer(self):
        chosen = {"initializer": torch.cuda.set_device, "initargs": (3,)}
        with futures.ThreadPoolExecutor(1, **chosen) as executor, ThreadPool(1, **chosen) as pool:
            assert executor.submit(seen).result() == pool.apply(seen) == (3, "None")
            with guard(1):
                assert executor.submit(seen).result() == pool.apply(seen) == (1, "cuda:1")
            assert executor.submit(seen).result() == pool.apply(seen) == (3, "None")
        assert {(s.source, s.target, s.site.file) for s in devguard.strays()} == {("cuda:3", "cuda:1", __file__)}

    def test_the_device_of_the_initializer_takes_precedence_over_the_owner_of_the_process(self):
        devguard.install(device=2)
        chosen = {"initializer": torch.cuda.set_device, "initargs": (3,)}
        with futures.ThreadPoolExecutor(1, **chosen) as executor, ThreadPool(1, **chosen) as pool:
            assert executor.submit(current).result() == pool.apply(current) == 3
        assert devguard.strays() == ()

    def test_an_initializer_that_sets_the_owner_is_no_stray(self):
        chosen = {"initializer": torch.cuda.set_device, "initargs": (1,)}
        with (
            guard(1, mode="error"),
            futures.ThreadPoolExecutor(1, **chosen) as executor,
            ThreadPool(1, **chosen) as pool,
        ):
            assert executor.submit(seen).result() == pool.apply(seen) == (1, "cuda:1")
        assert devguard.strays() == ()

    def test_a_task_on_a_worker_with_another_device_fails_in_mode_error(self):
        chosen = {"initializer": torch.cuda.set_device, "initargs": (3,)}
        with (
            guard(1, doors={"threads": "error"}),
            futures.ThreadPoolExecutor(1, **chosen) as executor,
            ThreadPool(1, **chosen) as pool,
        ):
            with pytest.raises(devguard.StrayDeviceError, match="cuda:3"):
                executor.submit(seen).result()
            with pytest.raises(devguard.StrayDeviceError, match="cuda:3"):
                pool.apply(seen)
            with guard(3):
                assert executor.submit(seen).result() == pool.apply(seen) == (3, "cuda:3")

    @pytest.mark.filterwarnings("error")
    def test_a_warning_that_is_an_error_is_printed_and_costs_the_task_nothing(self, capfd):
        chosen = {"initializer": torch.cuda.set_device, "initargs": (3,)}
        with guard(1, mode="warn"), futures.ThreadPoolExecutor(1, **chosen) as executor:
            for _ in range(2):  # one call site: the second one is silent
                assert executor.submit(seen).result() == (3, "cuda:1")
        assert capfd.readouterr().err.count("StrayDeviceWarning") == 1

    def test_a_task_that_was_refused_leaves_the_pool_usable(self):
        with futures.ThreadPoolExecutor(1) as executor:
            with guard(1, doors={"threads": "error"}), pytest.raises(devguard.StrayDeviceError):
                executor.submit(seen)
            assert executor.submit(seen).result() == (0, "None")

    def test_a_task_leaves_nothing_behind(self):
        def leaves_a_scope():
            guard(3).__enter__()

        with futures.ThreadPoolExecutor(1) as executor:
            with guard(1):
                executor.submit(leaves_a_scope).result()
                executor.submit(torch.cuda.set_device, 2).result()
                with pytest.raises(ZeroDivisionError):
                    executor.submit(lambda: 1 / 0).result()
                assert executor.submit(seen).result() == (1, "cuda:1")
            assert executor.submit(seen).result() == (0, "None")

    def test_a_pool_from_before_the_door_opened_runs_tasks_in_their_scopes(self):
        with futures.ThreadPoolExecutor(1) as executor, ThreadPool(1) as pool:
            executor.submit(seen).result(), pool.apply(seen)
            with guard(1):
                assert executor.submit(seen).result() == pool.apply(seen) == (1, "cuda:1")

    def test_a_device_change_by_a_library_is_judged_at_the_end_of_a_task_under_install(self):
        devguard.install(device=1)
        with futures.ThreadPoolExecutor(1) as executor, ThreadPool(1) as pool:
            executor.submit(clobber).result()
            pool.apply(clobber)
            assert executor.submit(current).result() == pool.apply(current) == 1
        assert sum(stray.count for stray in devguard.strays()) == 2

    def test_tasks_for_other_interpreters_are_not_wrapped(self):
        class InterpreterPoolExecutor(futures.ThreadPoolExecutor):  # Python 3.14 has such a class, which pickles tasks
            pass

        with guard(1), InterpreterPoolExecutor(1) as executor:
            assert executor.submit(current).result() == 0
        assert devguard.strays() == ()

    def test_callbacks_of_a_future_run_in_the_scopes_of_its_task(self):
        got: list[Any] = []
        go = threading.Event()
        with futures.ThreadPoolExecutor(1) as executor:
            with guard(1):
                future = executor.submit(go.wait)
                future.add_done_callback(lambda _: got.append(seen()))
                go.set()
            executor.submit(seen).result()
            assert executor.submit(seen).result() == (0, "None")
        assert got == [(1, "cuda:1")]

    def test_a_task_submitted_before_uninstall_still_enters_and_leaves_its_scopes(self):
        go = threading.Event()
        with futures.ThreadPoolExecutor(1) as executor:
            executor.submit(go.wait)
            with guard(1):
                task = executor.submit(seen)
            devguard.uninstall()
            go.set()
            assert task.result() == (1, "cuda:1")
            assert executor.submit(seen).result() == (0, "None")
        with guard(1):
            pass
        with futures.ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(2)) as executor:
            assert [executor.submit(current).result() for _ in range(3)] == [2, 2, 2]

    def test_the_work_items_of_python_3_14_are_supported(self, monkeypatch):
        class Item:
            def __init__(self, future: Any, task: Any) -> None:
                self.future = future
                self.task = task

            def run(self, context: Any) -> None:
                function, args, kwargs = self.task
                self.future.set_result(function(*args, **kwargs))

        got: list[Any] = []
        monkeypatch.setattr(sys.modules[__name__], "works", [lambda: got.append(str(devguard.owner()))])
        devguard.uninstall()
        monkeypatch.setattr(futures.thread, "_WorkItem", Item)
        future: futures.Future[Any] = futures.Future()
        with guard("cpu"):
            item = Item(future, (seen, (), {}))  # made by a `submit` of its own
            future.add_done_callback(lambda _: seen())
        in_thread(lambda: item.run(None))
        assert got == ["cpu", "cpu"]
        devguard.uninstall()

    def test_an_unknown_executor_keeps_the_door_closed(self, monkeypatch):
        class Item:
            def __init__(self, future: Any) -> None: ...

            def run(self) -> None: ...

        monkeypatch.setattr(futures.thread, "_WorkItem", Item)
        devguard.uninstall()
        with pytest.raises(DoorError, match=r"_WorkItem: Python 3.* has other parameters there, future\."):
            door.install()
        door.uninstall()  # the patches before the failure

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_does_not_inherit_the_scopes_of_a_running_task(self):
        go, runs = threading.Event(), threading.Event()
        with futures.ThreadPoolExecutor(1) as executor:
            with guard("cpu"):
                executor.submit(lambda: (runs.set(), go.wait()))
            runs.wait()
            pid = os.fork()
            if pid == 0:
                own = futures.ThreadPoolExecutor(1, initializer=guard("cpu").__enter__)
                owners = [str(own.submit(devguard.owner).result()) for _ in range(3)]
                os._exit(owners != ["cpu"] * 3)
            go.set()
            assert os.waitpid(pid, 0)[1] == 0

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_keeps_no_plans_of_its_parents_threads(self):
        go = threading.Event()
        with guard(1):
            threads = [threading.Thread(target=go.wait) for _ in range(4)]
            for thread in threads:
                thread.start()
        assert len(thread_plan.planned) == 4
        pid = os.fork()
        if pid == 0:
            os._exit(len(thread_plan.planned))
        go.set()
        for thread in threads:
            thread.join()
        assert os.waitpid(pid, 0)[1] == 0

    def test_the_pin_thread_of_a_loader_takes_the_device_of_the_thread_that_iterates(self, monkeypatch):
        from torch.utils.data import DataLoader, TensorDataset, _utils

        pinned_on: list[int] = []
        pin = _utils.pin_memory.pin_memory

        def noting(data: Any, *args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                pinned_on.append(current())
            return pin(data, *args)

        def iterate() -> int:
            data = TensorDataset(torch.arange(4.0))
            return len(list(DataLoader(data, batch_size=2, num_workers=1, pin_memory=True)))

        monkeypatch.setattr(_utils.pin_memory, "pin_memory", noting)
        assert in_thread(iterate) == 2
        assert set(pinned_on) == {0}
        pinned_on.clear()
        with guard(1):
            assert in_thread(iterate) == 2
        assert set(pinned_on) == {1}
        assert [stray.count for stray in devguard.strays()] == [1]


HOOKED = [
    (threading.Thread, ("start", "_bootstrap_inner")),
    (futures.ThreadPoolExecutor, ("submit",)),
    (futures.thread._WorkItem, ("__init__",)),
    (futures.Future, ("add_done_callback",)),
    (Pool, ("apply_async", "_map_async", "imap", "imap_unordered")),
]


def hooked() -> list[Any]:
    return [vars(owner)[name] for owner, names in HOOKED for name in names]


class TestInstalling:
    def test_uninstall_restores_exactly(self):
        found = hooked()
        with guard(1):
            assert not any(now is then for now, then in zip(hooked(), found, strict=True))
            assert devguard.uninstall() == []
        assert all(now is then for now, then in zip(hooked(), found, strict=True))

    def test_a_python_without_a_method_keeps_the_door_closed_and_is_a_problem_in_the_status(self, monkeypatch):
        found = hooked()
        monkeypatch.delattr(Pool, "imap_unordered")
        with guard(1):
            row = devguard.status()["doors"]["threads"]
        assert not row["open"]
        assert "cannot watch multiprocessing.pool.Pool.imap_unordered: Python" in row["problem"]
        monkeypatch.undo()
        assert hooked() == found
        with pytest.raises(DoorError):
            door._patches.find(threading.Thread, "no_such")

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (Pool, "imap_unordered"),
            (futures.ThreadPoolExecutor, "submit"),
            (futures.Future, "add_done_callback"),
            (queue.Queue, "get"),
            (threading.Condition, "wait"),
            (asyncio, "to_thread"),
        ],
    )
    def test_nothing_is_patched_before_everything_is_found(self, monkeypatch, owner, name):
        replaced: list[str] = []
        monkeypatch.delattr(owner, name)
        monkeypatch.setattr(door._patches, "replace", lambda owner, name, ours: replaced.append(name))
        with pytest.raises(DoorError, match=name):
            door.install()
        assert replaced == []
        monkeypatch.undo()
        assert door.uninstall() == []
