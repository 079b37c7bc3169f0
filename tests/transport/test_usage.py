"""What an arena says that it holds."""

from __future__ import annotations

import dataclasses

import pytest

from devguard.transport import Arena, join


def test_usage_names_budget_leases_readers_and_lines() -> None:
    with Arena("cpu", budget="4MiB") as arena, join(arena.address, "tp0"):
        held = arena.put(bytes(1 << 20), to=["tp0", "tp1"])
        counted = arena.put(bytes(100), to=3)
        usage = arena.usage()
        assert (usage.budget, usage.in_use, usage.peak) == (4 << 20, (1 << 20) + 4096, (1 << 20) + 4096)
        assert (usage.allocated, usage.waits, usage.waiting) == (4 << 20, 0, 0)
        assert [reader.partition(" ")[0] for reader in usage.readers] == ["tp0"]
        first, second = usage.leases
        assert (first.number, first.nbytes, first.cancelled) == (held.number, (1 << 20) + 4096, False)
        assert first.waits_for[0].startswith("tp0 (process ")
        assert first.waits_for[1] == "tp1 (not connected)"
        assert second.waits_for == ("3 of 3 readers that have not opened it",)
        assert counted.site == second.site
        assert "test_usage.py:" in first.site
        assert first.age >= second.age >= 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            usage.budget = 1  # type: ignore[misc]
        assert "bytes in use" in repr(arena)
