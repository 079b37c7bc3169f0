"""Receiving what another process shares: memory of the owner, guarded against unguarded."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # registers the reductions

import devguard
from benchmarks.measure import Row, Run, compare

OWNER = 1
BUDGET = 1.02


def _produce(connection: Connection) -> None:
    """Share a tensor on the owner's GPU, and keep it until the other side hangs up."""
    tensor = torch.zeros(1 << 20, dtype=torch.uint8).to(f"cuda:{OWNER}")
    connection.send_bytes(ForkingPickler.dumps(tensor))
    with contextlib.suppress(EOFError):
        connection.recv()


def _closed() -> None:
    devguard.uninstall()
    torch.cuda.set_device(OWNER)


def _opened() -> None:
    with devguard.guard(OWNER):
        pass
    torch.cuda.set_device(OWNER)


def _plain(call: Callable[[], Any]) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def _guarded(call: Callable[[], Any]) -> Run:
    def run(times: int) -> None:
        with devguard.guard(OWNER):
            for _ in range(times):
                call()

    return run


def ipc() -> list[Row]:
    """A tensor of 1 MB on the owner's GPU, read from one message over and over: the producer keeps the memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    producer = context.Process(target=_produce, args=(theirs,))
    producer.start()
    theirs.close()
    message = ours.recv_bytes()

    def receive() -> Any:
        return pickle.loads(message)

    def row(what: str) -> Row:
        return compare(what, _plain(receive), _guarded(receive), BUDGET, before_base=_closed, before_ours=_opened)

    rows = [row("IPC receive of 1 MB on the owner, opened each time")]
    kept = receive()
    rows.append(row("IPC receive of 1 MB on the owner, open already"))
    del kept
    ours.close()
    producer.join()
    return rows
