"""Threads that outlive the scope in which they were started, and take work that belongs to other scopes."""

from __future__ import annotations

import collections
import multiprocessing
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors.concurrency import handover
from devguard.ownership.stack import local

STOP = None


def seen() -> tuple[int, str]:
    return torch.cuda.current_device(), str(devguard.owner())


class Worker:
    """A worker of a library that devguard does not know: its thread starts at the first job."""

    def __init__(self) -> None:
        self.results: queue.Queue[Any] = queue.Queue()
        self.thread: threading.Thread | None = None

    def put(self, job: Any) -> None:
        raise NotImplementedError

    def take(self) -> Any:
        raise NotImplementedError

    def loop(self) -> None:
        while (job := self.take()) is not STOP:
            self.results.put(job())

    def submit(self, job: Any) -> Any:
        if self.thread is None:
            self.thread = threading.Thread(target=self.loop)
            self.thread.start()
        self.put(job)
        return self.results.get()

    def stop(self) -> None:
        self.put(STOP)
        if self.thread is not None:
            self.thread.join()


class Queued(Worker):
    kind: Any = queue.Queue

    def __init__(self) -> None:
        super().__init__()
        self.jobs = self.kind()

    def put(self, job: Any) -> None:
        self.jobs.put(job)

    def take(self) -> Any:
        return self.jobs.get()


class Lifo(Queued):
    kind = queue.LifoQueue


class OwnQueue(queue.Queue):  # type: ignore[type-arg]
    def _put(self, item: Any) -> None:
        super()._put((item,))

    def _get(self) -> Any:
        return super()._get()[0]


class Special(Queued):
    kind = OwnQueue


class Polling(Queued):
    def take(self) -> Any:
        while True:
            try:
                return self.jobs.get_nowait()
            except queue.Empty:
                threading.Event().wait(0.001)


class Conditioned(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.jobs: collections.deque[Any] = collections.deque()
        self.ready = threading.Condition()

    def put(self, job: Any) -> None:
        with self.ready:
            self.jobs.append(job)
            self.ready.notify()

    def take(self) -> Any:
        with self.ready:
            while not self.jobs:
                self.ready.wait()
            return self.jobs.popleft()


class Waiting(Conditioned):
    def take(self) -> Any:
        with self.ready:
            self.ready.wait_for(lambda: self.jobs)
            return self.jobs.popleft()


class Subclass(Queued):
    """Its thread is of a class with a `run` of its own."""

    def submit(self, job: Any) -> Any:
        if self.thread is None:
            worker = self

            class Thread(threading.Thread):
                def run(self) -> None:
                    worker.loop()

            self.thread = Thread()
            self.thread.start()
        return super().submit(job)


class Piped(Worker):
    """Word of its jobs comes through a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.receiver, self.sender = multiprocessing.Pipe(duplex=False)

    def put(self, job: Any) -> None:
        self.last = job
        self.sender.send("a job")

    def take(self) -> Any:
        self.receiver.recv()
        return self.last


KINDS: list[type[Worker]] = [Queued, Lifo, Special, Polling, Conditioned, Waiting, Subclass, Piped]


@pytest.fixture(params=KINDS)
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    made = request.param()
    yield made
    made.stop()


class TestAWorkerThatIsStartedInsideAScope:
    def test_it_has_the_scope_until_that_is_left_and_none_afterwards(self, worker):
        with guard(1):
            assert worker.submit(seen) == worker.submit(seen) == (1, "cuda:1")
        assert worker.submit(seen) == worker.submit(seen) == (0, "None")

    def test_later_work_without_a_guard_is_not_moved(self, worker):
        data = pickle.dumps(torch.ones(4).to("cuda:2"))

        def load() -> str:
            return str(pickle.loads(data).device)

        with guard(1):
            assert worker.submit(load) == "cuda:1"
        assert worker.submit(load) == "cuda:2"

    def test_it_does_not_get_the_scope_of_a_later_submitter(self, worker):
        with guard(1):
            worker.submit(seen)
        with guard(2):
            assert worker.submit(seen) == (0, "None")

    def test_entering_the_same_guard_again_is_another_entry(self, worker):
        with guard(1):
            worker.submit(seen)
        with guard(1):
            assert worker.submit(seen) == (0, "None")

    def test_it_falls_back_to_the_scope_around(self, worker):
        with guard(3):
            with guard(1):
                assert worker.submit(seen) == (1, "cuda:1")
            assert worker.submit(seen) == (3, "cuda:3")
        assert worker.submit(seen) == (0, "None")

    def test_it_falls_back_to_the_owner_of_the_process(self, worker):
        devguard.install(device=2)
        with guard(1):
            assert worker.submit(seen) == (1, "cuda:1")
        assert worker.submit(seen) == (2, "cuda:2")

    def test_unguarded_and_remap_end_too(self, worker):
        with guard(1), devguard.remap():
            assert worker.submit(seen) == (1, "cuda:1")
            with devguard.unguarded():
                pass
        assert worker.submit(seen) == (0, "None")

    def test_the_device_that_the_worker_selects_itself_stays(self, worker):
        def choose() -> None:
            torch.cuda.set_device(2)

        with guard(1):
            worker.submit(choose)
        assert worker.submit(seen) == (2, "None")

    def test_a_guard_around_the_job_holds(self, worker):
        with guard(1):
            worker.submit(seen)
        assert worker.submit(guard(3)(seen)) == (3, "cuda:3")
        assert worker.submit(seen) == (0, "None")

    def test_a_scope_that_a_coroutine_left_at_an_await_has_been_left(self, worker):
        import asyncio

        async def start() -> Any:
            first = worker.submit(seen)
            await asyncio.sleep(0)
            return first

        async def main() -> Any:
            return await guard(1).run(start())

        assert asyncio.run(main()) == (1, "cuda:1")
        assert worker.submit(seen) == (0, "None")

    def test_threads_that_the_worker_starts_follow(self, worker):
        def start() -> Any:
            got: list[Any] = []
            thread = threading.Thread(target=lambda: got.append(seen()))
            thread.start()
            thread.join()
            return got[0]

        with guard(1):
            assert worker.submit(start) == (1, "cuda:1")
        assert worker.submit(start) == (0, "None")

    def test_a_starter_that_has_ended_has_left_its_scopes(self, worker):
        def start() -> None:
            with guard(1):
                worker.submit(seen)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert worker.submit(seen) == (0, "None")

    def test_a_scope_that_its_starter_took_over_is_in_force_while_the_original_is(self, worker):
        def start() -> None:
            worker.submit(seen)

        with guard(1):
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
            assert worker.submit(seen) == (1, "cuda:1")
        assert worker.submit(seen) == (0, "None")

    def test_a_worker_that_a_task_starts_keeps_the_scope_of_the_submitter_while_that_is_entered(self, worker):
        with futures.ThreadPoolExecutor(1) as pool:
            with guard(1):
                assert pool.submit(worker.submit, seen).result() == (1, "cuda:1")
                assert worker.submit(seen) == (1, "cuda:1")
            assert worker.submit(seen) == (0, "None")

    def test_the_status_names_it(self, worker):
        with guard(1):
            worker.submit(seen)
        worker.submit(seen)
        assert worker.thread is not None
        assert devguard.status()["doors"]["threads"]["fallen_back"] == [worker.thread.name]
        devguard.uninstall()
        with guard(1):
            assert devguard.status()["doors"]["threads"]["fallen_back"] == []

    def test_in_mode_observe_work_inside_the_scope_is_judged_when_it_falls_back(self, worker):
        def work() -> None:
            torch.ones(1, device="cuda")

        with guard(1, mode="observe"):
            worker.submit(work)
        worker.submit(int)
        assert [(s.door, s.source, s.action) for s in devguard.strays()] == [("threads", "cuda:0", "observed")]

    def test_after_uninstall_it_keeps_what_it_has(self, worker):
        with guard(1):
            worker.submit(seen)
        devguard.uninstall()
        assert worker.submit(seen)[0] in (0, 1)


def run(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(work()))
    thread.start()
    return thread, got


class TestAThreadThatIsNoWorker:
    """What a thread waits for within its own work changes nothing: it may run longer than the scope."""

    @pytest.mark.parametrize("wait", ["event", "future", "semaphore", "barrier", "join", "full queue"])
    def test_waiting_for_a_signal_keeps_the_scope(self, wait):
        go, left = threading.Event(), threading.Event()
        barrier, semaphore, full = threading.Barrier(2), threading.Semaphore(0), queue.Queue(1)
        full.put(1)
        with futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(go.wait)
            ways: dict[str, Callable[[], Any]] = {
                "event": go.wait,
                "future": future.result,
                "semaphore": semaphore.acquire,
                "barrier": barrier.wait,
                "join": lambda: _join(go),
                "full queue": lambda: full.put(2),
            }

            def work() -> Any:
                left.wait()
                ways[wait]()
                return seen()

            with guard(1):
                thread, got = run(work)
            left.set()
            go.set()
            semaphore.release()
            full.get()
            if wait == "barrier":
                barrier.wait()
            thread.join()
        assert got == [(1, "cuda:1")]

    def test_a_queue_that_is_read_inside_a_guard_of_its_own_changes_nothing(self):
        jobs: queue.Queue[Any] = queue.Queue()

        def work() -> Any:
            with guard(2):
                jobs.get()
                return seen()

        with guard(1):
            thread, got = run(work)
        jobs.put(1)
        thread.join()
        assert got == [(2, "cuda:2")]

    def test_a_task_that_reads_a_queue_keeps_the_scope_of_its_submitter(self):
        jobs: queue.Queue[Any] = queue.Queue()
        with futures.ThreadPoolExecutor(1) as pool:
            with guard(1):
                future = pool.submit(lambda: (jobs.get(), seen())[1])
            jobs.put(1)
            assert future.result() == (1, "cuda:1")

    def test_the_pin_thread_of_a_loader_keeps_its_device(self):
        from torch.utils.data import DataLoader, TensorDataset

        with guard(1):
            batches = iter(DataLoader(TensorDataset(torch.arange(8.0)), num_workers=1, pin_memory=True))
            next(batches)
        assert sum(1 for _ in batches) == 7
        assert [device.index for device in devguard.contexts()] in ([1], [0, 1], [0, 1, 2], [0, 1, 2, 3])


def _join(go: threading.Event) -> None:
    thread = threading.Thread(target=go.wait)
    thread.start()
    thread.join()


def test_the_main_thread_is_no_worker():
    jobs: queue.Queue[int] = queue.Queue()
    with guard(1):
        jobs.put(1)
        jobs.get()
        assert seen() == (1, "cuda:1")
        assert local.stack.inherited is None


def test_results_and_exceptions_of_a_queue_pass_through():
    jobs: queue.Queue[int] = queue.Queue()
    with guard(1), pytest.raises(queue.Empty):
        jobs.get(timeout=0.001)
    jobs.put(3)
    with guard(1):
        assert jobs.get(block=False) == 3
        condition = threading.Condition()
        with condition:
            assert condition.wait(0.001) is False


def test_the_names_in_the_status_are_bounded():
    with guard(1):
        workers = [Queued() for _ in range(handover.MAX_NAMES + 2)]
        for each in workers:
            each.submit(seen)
    for each in workers:
        each.submit(seen)
        each.stop()
    assert len(handover.fallen_back) == handover.MAX_NAMES
