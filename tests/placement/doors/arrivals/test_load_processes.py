"""Several processes on simulated GPUs: object collectives, and a router between a sender and its receiver."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import devguard
from devguard import guard


def collect(rank: int, size: int, store: str, guarded: bool, results: mp.SimpleQueue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    scope = guard(rank) if guarded else devguard.unguarded()
    torch.cuda.set_device(rank)
    with scope:
        gathered: list = [None] * size
        dist.all_gather_object(gathered, {"x": torch.full((4,), rank).to(f"cuda:{rank}")})
        shared = [{"y": torch.arange(4).to(f"cuda:{rank}")} if rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
    contexts = [device.index for device in devguard.contexts()]
    places = [item["x"].device.index for item in gathered] + [shared[0]["y"].device.index]
    values = [item["x"].tolist() for item in gathered]
    results.put((rank, contexts, places, values))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("guarded", [False, True])
def test_object_collectives_land_on_each_receivers_owner_if_guarded(guarded, tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    args = (2, str(tmp_path / "store"), guarded, results)
    processes = [context.Process(target=collect, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    got = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [row[3] for row in got] == [[[0] * 4, [1] * 4]] * 2
    if guarded:
        assert [(row[1], row[2]) for row in got] == [([0], [0, 0, 0]), ([1], [1, 1, 1])]
    else:
        assert [(row[1], row[2]) for row in got] == [([0, 1], [0, 1, 0]), ([0, 1], [0, 1, 0])]


@guard("cpu")
def route(source, target) -> None:
    """Unpickle and pickle again, as a data-parallel controller does; then send the state of CUDA in this process."""
    target.send_bytes(pickle.dumps(pickle.loads(source.recv_bytes())))
    target.send((devguard.status()["contexts"], torch.cuda.is_initialized()))


@guard(argument="gpu_id")
def receive(gpu_id: int, connection, results: mp.SimpleQueue) -> None:
    value = pickle.loads(connection.recv_bytes())
    router = connection.recv()
    results.put((str(value["x"].device), value["x"].tolist(), str(value["host"].device), router, os.getpid()))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_router_that_owns_the_cpu_changes_nothing_for_the_receiver(method):
    context = mp.get_context(method)
    to_router, from_us = context.Pipe(duplex=False)
    to_receiver, from_router = context.Pipe(duplex=False)
    results = context.SimpleQueue()
    processes = [
        context.Process(target=route, args=(to_router, from_router)),
        context.Process(target=receive, args=(2, to_receiver, results)),
    ]
    for process in processes:
        process.start()
    from_us.send_bytes(pickle.dumps({"x": torch.arange(4.0).to("cuda:0"), "host": torch.ones(1)}))
    device, values, host, router, _ = results.get()
    for process in processes:
        process.join()
    assert (device, values, host) == ("cuda:2", [0, 1, 2, 3], "cpu")
    assert router == ([], False)
