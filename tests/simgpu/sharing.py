"""Programs for test_ipc.py, in a module because torch.multiprocessing spawns processes that import them."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from typing import Any

import torch
import torch.multiprocessing as mp

from devguard import simgpu


def me() -> simgpu.ProcessState:
    return next(process for process in simgpu.state() if process.pid == os.getpid())


def contexts() -> list[int]:
    return [device.index for device in me().devices if device.context]


def receive(tensors: Any, answers: Any) -> None:
    """Read the tensor that the parent shares, write to it, and report the devices and memory used."""
    torch.cuda.set_device(1)
    t = tensors.get()
    values = t.cpu().tolist()
    t.copy_(torch.tensor([9.0, 9.0, 9.0, 9.0]))  # The parent must see this.
    process = me()
    answers.put(
        {
            "device": str(t.device),
            "values": values,
            "contexts": contexts(),
            "bytes": [d.bytes for d in process.devices],
            "opens": [d.ipc_opens for d in process.devices],
        }
    )
    del t
    answers.put(tensors.get())  # Wait until the parent has checked.


def wait_for_event(handle: bytes, answers: Any) -> None:
    event = torch.cuda.Event.from_ipc_handle(torch.device("cuda:1"), handle)
    event.synchronize()
    answers.put((event.query(), contexts()))


def memory() -> None:
    """Share memory and events between two processes, from GPU 0 and from GPU 2."""
    context = mp.get_context("spawn")
    tensors, answers = context.Queue(), context.Queue()
    for index in (0, 2):
        t = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(f"cuda:{index}")
        child = context.Process(target=receive, args=(tensors, answers))
        child.start()
        tensors.put(t)
        seen = answers.get(timeout=100)
        assert seen["device"] == f"cuda:{index}", seen
        assert seen["values"] == [1.0, 2.0, 3.0, 4.0], seen
        assert seen["contexts"] == sorted({1, index}), seen
        assert seen["opens"][index] == 1, seen
        assert sum(seen["opens"]) == 1, seen
        assert seen["bytes"] == [0, 0, 0], seen  # Imported memory counts for the exporter.
        assert t.cpu().tolist() == [9.0] * 4
        tensors.put(None)
        answers.get(timeout=100)
        child.join()
        assert child.exitcode == 0
    with torch.cuda.device(1):
        event = torch.cuda.Event(interprocess=True)
        event.record()
        child = context.Process(target=wait_for_event, args=(event.ipc_handle(), answers))
        child.start()
        assert answers.get(timeout=100) == (True, [1])
        child.join()


def count(rank: int, queue: Any, answers: Any) -> None:
    torch.cuda.set_device(rank)
    right = 0
    while (t := queue.get()) is not None:
        right += int(t.device.index == int(t.cpu()[0]))
        del t
    answers.put(right)


def stress() -> None:
    """Send 400 tensors to 4 processes, then copy around the GPUs in 4 threads at once."""
    context, gpus = mp.get_context("spawn"), torch.cuda.device_count()
    queues, answers = [context.Queue() for _ in range(4)], context.Queue()
    children = [context.Process(target=count, args=(rank % gpus, queues[rank], answers)) for rank in range(4)]
    for child in children:
        child.start()
    for i in range(400):
        t = torch.tensor([float(i % gpus)] * (1 + i * 99)).to(f"cuda:{i % gpus}")
        queues[i // gpus % 4].put(t)
        del t
    for queue in queues:
        queue.put(None)
    assert [answers.get(timeout=100) for _ in children] == [100] * 4
    for child in children:
        child.join()

    failures: list[BaseException] = []

    def around(k: int) -> None:
        try:
            for i in range(200):
                a = torch.full((1000 + i,), k, device=f"cuda:{k}")
                b = a.to(f"cuda:{(k + 1) % gpus}")
                assert int(b.cpu()[5]) == k
                assert b.device.index == (k + 1) % gpus
        except BaseException as error:  # noqa: BLE001  (raised in the main thread)
            failures.append(error)

    threads = [threading.Thread(target=around, args=(k,)) for k in range(gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
    assert [torch.cuda.memory_allocated(i) for i in range(gpus)] == [0] * gpus
    assert [d.bytes for d in me().devices] == [0] * gpus


def plain_pickle() -> None:
    """Check that a pickle of a CUDA tensor holds its bytes and its device."""
    blob = pickle.dumps(torch.tensor([1.0]).to("cuda:1"))
    assert pickle.loads(blob).device.index == 1
    assert contexts() == [1]


if __name__ == "__main__":
    {"memory": memory, "stress": stress, "pickle": plain_pickle}[sys.argv[1]]()
