"""The line that allocated memory on a device, from torch's own history."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch

from devguard.support import allocation_history
from tests.helpers import fresh


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    torch.cuda.init()
    yield
    allocation_history.stop()
    assert not torch._C._cuda_isHistoryEnabled()


def make(index: int) -> torch.Tensor:
    return torch.empty(1000, dtype=torch.uint8, device=f"cuda:{index}")  # this line


LINE = make.__code__.co_firstlineno + 1


def test_the_newest_allocations_of_a_device_have_their_line_and_bytes() -> None:
    allocation_history.record()
    before = allocation_history.count(2)
    kept = [torch.empty(8, device="cuda:3"), make(2), make(2), torch.empty(8, device="cuda:3")]
    assert allocation_history.count(2) - before == 2
    origin, nbytes = allocation_history.newest(2, 2)
    assert origin is not None
    assert origin.code is not None
    assert (origin.code.co_filename, origin.code.co_name, origin.line) == (__file__, "make", LINE)
    assert origin.stack[1].code.co_name == "test_the_newest_allocations_of_a_device_have_their_line_and_bytes"
    assert nbytes == 2000
    del kept


def test_if_a_library_allocates_the_line_is_the_users() -> None:
    payload = pickle.dumps(make(2))
    allocation_history.record()
    pickle.loads(payload)
    origin, _ = allocation_history.newest(2, 1)
    assert origin is not None
    assert origin.line == test_if_a_library_allocates_the_line_is_the_users.__code__.co_firstlineno + 3


def test_without_a_history_there_is_a_count_but_no_line() -> None:
    before = allocation_history.count(2)
    make(2)
    assert allocation_history.count(2) == before + 1
    assert allocation_history.newest(2, 1) == (None, 0)


def test_a_history_that_the_program_records_is_not_stopped() -> None:
    torch.cuda.memory._record_memory_history(max_entries=10)
    allocation_history.record()
    allocation_history.stop()
    assert torch._C._cuda_isHistoryEnabled()
    torch.cuda.memory._record_memory_history(enabled=None)


def test_before_cuda_is_initialised_there_is_no_history_and_cuda_stays_uninitialised() -> None:
    code = (
        "from devguard.support import allocation_history\n"
        "allocation_history.record(); print(allocation_history.count(0), allocation_history.newest(0, 1))\n"
        "allocation_history.stop()\n"
        "print(torch.cuda.is_initialized(), ctx())\n"
    )
    assert fresh.run(code)["out"] == "0 (None, 0)\nFalse []"
