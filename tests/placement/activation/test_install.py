"""Doors that open and close on simulated GPUs, while other threads load and move tensors."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import guard

CYCLES = 40


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def data() -> tuple[bytes, bytes]:
    tensor, buffer = torch.arange(8.0).to("cuda:0"), io.BytesIO()
    torch.save(tensor, buffer)
    return pickle.dumps(tensor), buffer.getvalue()


LOOPS: dict[str, Callable[[bytes, bytes], Any]] = {
    "unpickle": lambda pickled, saved: pickle.loads(pickled),
    "relay": lambda pickled, saved: pickle.loads(pickle.dumps(pickle.loads(pickled))),
    "load": lambda pickled, saved: torch.load(io.BytesIO(saved)),
    "load with a dictionary": lambda pickled, saved: torch.load(io.BytesIO(saved), map_location={}),
    "load with a function": lambda pickled, saved: torch.load(
        io.BytesIO(saved), map_location=lambda storage, tag: storage.cuda(2)
    ),
    "remap": lambda pickled, saved: _from_buffer(),
}


def _from_buffer() -> torch.Tensor:
    with devguard.remap():
        return torch.frombuffer(bytearray(torch.arange(8.0).numpy().tobytes()), dtype=torch.float32)


@pytest.mark.parametrize("owner", [1, "cpu"])
@pytest.mark.parametrize("name", LOOPS)
def test_values_are_right_while_doors_open_and_close(name, owner):
    problems, stop, started = [], threading.Event(), threading.Barrier(3)
    sent = data()

    def repeat():
        try:
            with guard(owner):
                started.wait()
                while not stop.is_set():
                    assert LOOPS[name](*sent).tolist() == list(range(8))
        except BaseException as error:  # noqa: BLE001 - the test shows it
            problems.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait()
    for _ in range(CYCLES):
        devguard.install(device=owner)
        devguard.uninstall()
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
