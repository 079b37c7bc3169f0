"""What an arena says that it holds."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest

from devguard.transport import Arena, Handle, join
from tests.helpers.transport_children import await_that


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
        assert (usage.puts, usage.put_bytes) == (2, held.nbytes + counted.nbytes)
        assert (usage.wait_seconds, usage.deaths, usage.cancelled) == (0.0, 0, 0)


def test_a_sample_is_plain_data_that_is_equal_while_nothing_changes() -> None:
    with Arena("cpu", budget="4MiB") as arena, join(arena.address, "tp0"):
        small = arena.put(bytes(100), to=3)
        large = arena.put(bytes(1 << 20), to=["tp0", "tp1"])
        before = time.time()
        await_that(lambda: arena.sample()["puts"] == 2)
        sample = arena.sample()
        assert arena.sample() == sample
        assert json.loads(json.dumps(sample)) == sample
        oldest = sample.pop("oldest")
        assert oldest.pop("put_at") == pytest.approx(before, abs=60)
        waits_for = oldest.pop("waits_for")
        assert [text.partition(" ")[0] for text in waits_for] == ["tp0", "tp1"]
        assert oldest == {"bytes": large.nbytes // 4096 * 4096 + 4096, "site": large.site}
        histogram = sample.pop("release_seconds")
        assert (set(histogram["counts"]), histogram["sum"]) == ({0}, 0)
        assert sample == {
            "kind": "cpu",
            "address": arena.address,
            "budget": 4 << 20,
            "in_use": oldest["bytes"],
            "peak": oldest["bytes"],
            "allocated": 4 << 20,
            "leases": 2,
            "waiting": 0,
            "waiting_since": None,
            "waits": 0,
            "puts": 2,
            "put_bytes": small.nbytes + large.nbytes,
            "wait_seconds": 0.0,
            "deaths": 0,
            "cancelled": 0,
        }


def test_a_sample_has_the_put_that_waits_and_its_wait_afterwards() -> None:
    with Arena("cpu", budget="4MiB") as arena:
        assert arena.sample()["oldest"] is None
        first, began = arena.put(bytes(3 << 20)), time.time()
        second: list[Handle] = []  # kept, because a handle that was never sent cancels its lease when it is collected
        waiting = threading.Thread(target=lambda: second.append(arena.put(bytes(3 << 20))))
        waiting.start()
        await_that(lambda: arena.sample()["waiting"] == 1)
        sample = arena.sample()
        assert arena.sample() == sample
        assert sample["waiting_since"] == pytest.approx(began, abs=60)
        assert (sample["waits"], sample["wait_seconds"]) == (1, 0.0)
        first.get()
        waiting.join(20)
        second[0].get()
        await_that(lambda: not arena.sample()["leases"])
        sample = arena.sample()
        assert (sample["waiting"], sample["waiting_since"], sample["puts"]) == (0, None, 2)
        assert sample["wait_seconds"] > 0.0
        assert sample["release_seconds"]["counts"][-1] == 2


def test_a_small_payload_is_the_oldest_only_where_no_other_is() -> None:
    with Arena("cpu", budget="4MiB") as arena:
        handle = arena.put(bytes(100))
        await_that(lambda: arena.sample()["leases"] == 1)
        assert arena.sample()["oldest"]["site"] == handle.site
