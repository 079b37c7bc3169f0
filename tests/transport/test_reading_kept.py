"""Objects that are used in place until their memory is collected, and no scope ends their lease."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devguard import transport
from devguard.errors import HandleReleased
from devguard.transport import Arena, reading


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(budget="8MiB") as made:
        yield made


def sent(handle: Any) -> Any:
    return pickle.loads(pickle.dumps(handle))


def wait_for(arena: Arena, in_use: int) -> None:
    until = time.monotonic() + 10
    while arena.usage().in_use != in_use:
        assert time.monotonic() < until, arena.usage()
        time.sleep(0.001)


def test_the_lease_ends_with_the_last_view_of_the_tensor(arena: Arena) -> None:
    value = torch.arange(1 << 18).float()
    tensor = reading.keep(sent(arena.put(value)))
    assert torch.equal(tensor, value)
    part = tensor.view(2, -1)[1, 7:]
    del tensor
    gc.collect()
    time.sleep(0.05)
    assert arena.usage().in_use >= value.nbytes
    assert torch.equal(part, value[(1 << 17) + 7 :])
    del part
    wait_for(arena, 0)


def test_a_second_reader_keeps_the_bytes_of_the_lease(arena: Arena) -> None:
    handle = sent(arena.put(torch.ones(1 << 18), to=2))
    one = transport.join(handle.address, "one")
    two = transport.join(handle.address, "two")
    with one, two:
        first, second = reading.keep(handle, "one"), reading.keep(handle, "two")
        first.add_(1)  # private
        del first
        time.sleep(0.05)
        assert arena.usage().in_use > 0
        assert second.sum() == 1 << 18
        del second
        wait_for(arena, 0)


def test_a_payload_in_the_handle_and_an_object_without_memory_end_their_lease_at_once(arena: Arena) -> None:
    small = reading.keep(sent(arena.put(torch.arange(4))))
    text = reading.keep(sent(arena.put("x" * (1 << 17))))
    assert small.tolist() == [0, 1, 2, 3]
    assert text == "x" * (1 << 17)
    until = time.monotonic() + 10
    while arena.usage().leases:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_cancelled_lease_waits_for_the_kept_tensor_and_a_late_one_is_refused(arena: Arena) -> None:
    handle = arena.put(torch.ones(1 << 18), to=2)
    tensor = reading.keep(sent(handle))
    handle.cancel()
    time.sleep(0.05)
    assert arena.usage().in_use > 0
    assert tensor.sum() == 1 << 18
    with pytest.raises(HandleReleased):
        sent(handle).get(reader=None)
    del tensor
    wait_for(arena, 0)


def test_a_tensor_may_be_collected_inside_a_call_of_the_reader(arena: Arena) -> None:
    """The cyclic collector runs anywhere, also where this thread holds the locks of the channel."""
    handle = sent(arena.put(torch.ones(1 << 18)))
    tensor = reading.keep(handle)
    reader = transport.join(handle.address)
    with reader._changed, reader.channel._lock:
        del tensor
        gc.collect()
    wait_for(arena, 0)


def test_a_forked_child_that_drops_the_tensor_leaves_the_parents_lease_alone(arena: Arena) -> None:
    tensor = reading.keep(sent(arena.put(torch.ones(1 << 18))))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            del tensor
            gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.05)
    assert arena.usage().in_use > 0
    assert tensor.sum() == 1 << 18
    del tensor
    wait_for(arena, 0)


def test_the_lease_ends_without_the_cyclic_collector(arena: Arena) -> None:
    gc.collect()
    gc.disable()
    try:
        tensor = reading.keep(sent(arena.put({"pixel_values": torch.ones(1 << 18), "grid": [1, 2]})))
        del tensor
        wait_for(arena, 0)
    finally:
        gc.enable()


def test_a_process_that_ends_with_a_kept_tensor_writes_nothing(arena: Arena) -> None:
    program = (
        "import pickle, sys, torch; from devguard.transport import reading\n"
        "tensor = reading.keep(pickle.loads(bytes.fromhex(sys.argv[1])))\n"
        "print(int(tensor.sum()))"
    )
    handle = pickle.dumps(arena.put(torch.ones(1 << 18))).hex()
    done = subprocess.run([sys.executable, "-c", program, handle], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == (f"{1 << 18}\n", "")
    wait_for(arena, 0)
