"""Memory on devices without an owner: what the allocator counted since a picture, by line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.reporting import foreign_memory
from devguard.reporting.journal import journal
from devguard.support import allocation_history

THERE = "cuda:2"


def make() -> torch.Tensor:
    return torch.empty(1000, dtype=torch.uint8, device=THERE)


@pytest.fixture(autouse=True)
def _open() -> Any:
    torch.empty(1, device=THERE)
    yield
    allocation_history.stop()


def grown(work: Any, **options: Any) -> list[tuple[str, int, str]]:
    """Return the strays of `work` in a guard: source, bytes and function."""
    with guard(1):
        mark, picture = journal.mark(), foreign_memory.take_picture()
        assert THERE in picture.contexts
        work()
        foreign_memory.record_growth(picture, mark, options.pop("mode", "observe"), **options)
        found = journal.since(mark)
    assert all(map(foreign_memory.is_memory, found))
    return [(stray.source, stray.bytes, stray.site.function) for stray in found if stray.site]


def test_each_line_is_recorded_with_its_bytes() -> None:
    allocation_history.record()
    assert grown(lambda: [make(), make(), torch.empty(10, dtype=torch.uint8, device=THERE)]) == [
        (THERE, 2000, "make"),
        (THERE, 10, "<lambda>"),
    ]


def test_without_a_history_the_caller_is_named() -> None:
    assert grown(make) == [(THERE, 1024, "grown")]


def test_what_the_history_has_forgotten_is_recorded_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation_history, "MAX_ENTRIES", 2)
    allocation_history.record()
    kept: list[torch.Tensor] = []
    found = grown(lambda: kept.extend(make() for _ in range(5)))
    assert {function for _, _, function in found} == {"make", "grown"}


def test_nothing_is_recorded_if_the_door_is_off_the_device_is_accepted_allowed_or_owned() -> None:
    assert grown(make, mode="off") == []
    assert grown(make, accepted={2}) == []
    with guard(2):
        assert grown(make) == []
    devguard.uninstall()
    devguard.allow(THERE)
    assert grown(make) == []


def test_counters_of_before_and_frees_are_no_growth() -> None:
    kept = [make()]
    assert grown(kept.clear) == []
    assert grown(lambda: torch.cuda.reset_accumulated_memory_stats(2)) == []


def test_usage_since_a_reset_counts_what_is_new() -> None:
    usage = allocation_history.Usage
    assert usage(5, 500, 100).since(usage(3, 300, 100)) == usage(2, 200, 0)
    assert usage(1, 50, 150).since(usage(3, 300, 100)) == usage(1, 50, 50)
    assert usage(0, 0, 150).since(usage(0, 0, 100)) == usage(0, 50, 50)
