"""torch's allocator: its counters and its history, where the program may have put another in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devguard.support import allocator
from tests.helpers import fresh


def fail(*_: Any) -> Any:
    raise RuntimeError("not supported")


def test_the_statistics_count_the_allocations_of_one_device() -> None:
    torch.cuda.init()
    before = allocator.statistics(3)["allocation"]["all"]["allocated"]
    torch.empty(4, device="cuda:3")
    assert allocator.statistics(3)["allocation"]["all"]["allocated"] == before + 1


def test_an_allocator_without_statistics_or_history_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.init()
    for name in ("_cuda_memoryStats", "_cuda_isHistoryEnabled", "_cuda_record_memory_history"):
        monkeypatch.setattr(torch._C, name, fail)
    assert allocator.statistics(0) == {}
    assert not allocator.keeps_history()
    assert not allocator.record_history(10)


def test_the_history_can_be_started_and_stopped() -> None:
    torch.cuda.init()
    assert allocator.record_history(10)
    assert allocator.keeps_history()
    made = torch.empty(16, dtype=torch.uint8, device="cuda:2")
    assert [entry["size"] for entry in allocator.history(2) if entry["action"] == "alloc"] == [made.numel()]
    allocator.stop_history()
    assert not allocator.keeps_history()


def test_pinned_memory_is_noticed_and_nothing_is_initialised() -> None:
    code = (
        "from devguard.support import allocator\n"
        "print(allocator.has_pinned_memory(), allocator.statistics(0), allocator.keeps_history(), ctx())\n"
        "x = torch.empty(4, pin_memory=True); print(allocator.has_pinned_memory())\n"
    )
    assert fresh.run(code)["out"] == "False {} False []\nTrue"
    fresh.stop()
