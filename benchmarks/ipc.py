"""Receiving memory that another process shares on the owner's GPU, guarded against unguarded."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # Registers the reductions.

import devguard
from benchmarks.measure import Row, compare
from benchmarks.states import OWNER, closed, guarded, opened, plain

BUDGET = 1.02


def _produce(connection: Connection) -> None:
    """Share a tensor on the owner's GPU, and keep it until the other end closes the connection."""
    tensor = torch.zeros(1 << 20, dtype=torch.uint8).to(f"cuda:{OWNER}")
    connection.send_bytes(ForkingPickler.dumps(tensor))
    with contextlib.suppress(EOFError):
        connection.recv()


def ipc() -> list[Row]:
    """Time the receipt of a tensor of 1 MB on the owner's GPU, always from the same message of a live producer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    producer = context.Process(target=_produce, args=(theirs,))
    producer.start()
    theirs.close()
    message = ours.recv_bytes()

    def receive() -> Any:
        return pickle.loads(message)

    def row(what: str, budget: float | None = BUDGET) -> Row:
        return compare(what, plain(receive), guarded(receive), budget, before_base=closed, before_ours=opened)

    rows = [row("IPC receive of 1 MB on the owner, opened each time")]
    kept = receive()
    rows.append(row("IPC receive of 1 MB on the owner, open already"))
    with devguard.guard(0):
        pass
    rows.append(row("the same, in a process that has had two owners", None))
    del kept
    ours.close()
    producer.join()
    return rows
