"""``python -m tests.soak``: processes x threads x mixed operations with three owners, on simulated GPUs.

Each thread owns a GPU and does in random order: pickles of tensors tagged for another GPU, nested guards, exceptions
out of guards, threads, cancelled tasks, and CUDA IPC with its neighbour process. Every tensor must lie on its owner,
and no memory, patch, thread, file descriptor or entered scope may be left at the end. Prints one line of JSON; the
exit status is 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pickle
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

OWNERS = (1, 2, 3)
GPUS = 4
PERIOD = 64  # Operations between two IPC messages of a thread.


class Thread:
    """One soaking thread: its owner, its random numbers and what it did."""

    def __init__(self, process: Process, number: int) -> None:
        self.process = process
        self.owner = OWNERS[number % len(OWNERS)]
        self.random = random.Random(f"{process.rank} {number}")
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, operations: int) -> None:
        import devguard

        kinds: list[Callable[[], None]] = [
            self.unpickle,
            self.unpickle,
            self.unpickle,
            self.nested,
            self.exception,
            self.thread,
            self.cancelled,
        ]
        with devguard.guard(self.owner):
            for step in range(operations):
                operation = self.receive if step % PERIOD == 0 else self.random.choice(kinds)
                operation()
                self.counts[operation.__name__] += 1
                if step % PERIOD == PERIOD // 2:
                    self.send()
        if devguard.owner() is not None:
            self.wrong.append("an owner was left behind")

    def expect(self, tensor: Any, owner: int, what: str) -> None:
        if tensor.device.index != owner or tensor.cpu().tolist() != list(range(8)):
            self.wrong.append(f"{what}: {tensor.device}, owner {owner}, {tensor.cpu().tolist()}")

    def unpickle(self) -> None:
        self.expect(pickle.loads(self.process.message), self.owner, "pickle")

    def nested(self) -> None:
        import devguard

        other = self.random.choice(OWNERS)
        with devguard.guard(other), devguard.guard(self.owner), devguard.guard(other):
            self.expect(pickle.loads(self.process.message), other, "nested")
        self.unpickle()

    def exception(self) -> None:
        import devguard

        with contextlib.suppress(LookupError), devguard.guard(self.random.choice(OWNERS)):
            raise LookupError
        self.unpickle()

    def thread(self) -> None:
        thread = threading.Thread(target=self.unpickle)
        thread.start()
        thread.join()

    def cancelled(self) -> None:
        import devguard

        other = self.random.choice(OWNERS)

        @devguard.guard(other)
        async def forever() -> None:
            while True:
                self.expect(pickle.loads(self.process.message), other, "task")
                await asyncio.sleep(0)

        async def main() -> None:
            task = asyncio.create_task(forever())
            await asyncio.sleep(0)
            self.unpickle()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        asyncio.run(main())

    def send(self) -> None:
        import torch

        with contextlib.suppress(queue.Full):
            self.process.outbox.put_nowait(torch.arange(8.0).to("cuda"))

    def receive(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.expect(self.process.inbox.get_nowait(), self.owner, "ipc")


class Process:
    """State that the threads of one process share."""

    def __init__(self, rank: int, message: bytes, inbox: Any, outbox: Any) -> None:
        self.rank = rank
        self.message = message
        self.inbox = inbox
        self.outbox = outbox


def work(rank: int, message: bytes, boxes: list[Any], threads: int, operations: int, gate: Any, results: Any) -> None:
    """Run the threads of one process; put a report of their operations and of everything left into `results`."""
    import torch

    import devguard

    process = Process(rank, message, boxes[rank], boxes[(rank + 1) % len(boxes)])
    warm = Thread(process, 0)
    warm.run(PERIOD)
    before = _resources()
    soaking = [Thread(process, number) for number in range(threads)]
    running = [threading.Thread(target=one.run, args=(operations,)) for one in soaking]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    gate.wait()  # A process frees its memory only when its neighbour no longer opens it.
    while True:
        try:
            process.inbox.get(timeout=1)
        except queue.Empty:
            break
    gate.wait()
    wrong = [text for one in [warm, *soaking] for text in one.wrong]
    torch.cuda.ipc_collect()
    allocated = sum(torch.cuda.memory_allocated(index) for index in OWNERS)
    contexts = [device.index for device in devguard.contexts()]
    after = _resources()
    counts = sum((one.counts for one in soaking), Counter())
    left = devguard.uninstall()
    results.put(
        {
            "rank": rank,
            "operations": sum(counts.values()),
            "counts": dict(counts),
            "wrong": wrong[:5],
            "wrong_count": len(wrong),
            "contexts": contexts,
            "allocated": allocated,
            "threads": after["threads"] - before["threads"],
            "descriptors": after["descriptors"] - before["descriptors"],
            "patches_left": left,
        }
    )


def _resources() -> dict[str, int]:
    return {"threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd"))}


def soak(processes: int, threads: int, operations: int) -> dict[str, Any]:
    """Run all processes here, on simulated or real GPUs; return the sums and the errors."""
    import torch
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    message = pickle.dumps(torch.arange(8.0).to("cuda:0"))
    boxes = [context.Queue(maxsize=64) for _ in range(processes)]
    gate, results = context.Barrier(processes), context.Queue()
    start = time.monotonic()
    args = (message, boxes, threads, operations, gate, results)
    children = [context.Process(target=work, args=(rank, *args)) for rank in range(processes)]
    for child in children:
        child.start()
    rows = []
    while len(rows) < processes:
        try:
            rows.append(results.get(timeout=1))
        except queue.Empty:
            dead = [child.exitcode for child in children if child.exitcode]
            if dead:
                raise RuntimeError(f"a soaking process ended with status {dead[0]}") from None
    for child in children:
        child.join()
    summed = ("operations", "wrong_count", "allocated", "threads", "descriptors")
    return {
        **{name: sum(row[name] for row in rows) for name in summed},
        "foreign_contexts": sorted({index for row in rows for index in row["contexts"]} - set(OWNERS)),
        "patches_left": sorted({name for row in rows for name in row["patches_left"]}),
        "counts": dict(sum((Counter(row["counts"]) for row in rows), Counter())),
        "wrong": [text for row in rows for text in row["wrong"]][:10],
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--operations", type=int, default=2000, help="operations of each thread")
    arguments = parser.parse_args()
    from devguard import simgpu

    if not simgpu.active():
        from tests.helpers import simulated

        command = [sys.executable, "-m", "tests.soak", *sys.argv[1:]]
        os.execve(sys.executable, command, simulated.sim_environment(GPUS))
    report = soak(arguments.processes, arguments.threads, arguments.operations)
    print(json.dumps(report))
    clean = not any(
        report[name] for name in ("wrong_count", "allocated", "threads", "foreign_contexts", "patches_left")
    )
    return 0 if clean and report["descriptors"] <= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
