"""An arena between a GPU and N ranks, by the simulation's own count: copies, contexts, and bytes on each GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.simulated import ROOT

SIZE = 4 << 20  # bytes of the payload
PROGRAM = ROOT / "tests" / "helpers" / "transport_ranks.py"


@pytest.fixture(scope="module", params=[2, 4, 8])
def ranks(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def result(ranks: int, sim_environment: Callable[..., dict[str, str]], run_simulated: Callable[..., Any]) -> Any:
    environment = sim_environment(ranks)
    # Without its cache, torch gives each tensor the memory that it needs, so that the counts are exact.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    return run_simulated([PROGRAM, str(ranks)], env=environment).result


def test_a_payload_goes_down_once_and_up_once_for_each_rank(result: Any, ranks: int) -> None:
    assert result["copies"] == {"down": [SIZE], "up": [SIZE] * ranks, "across": []}
    assert result["values"] == [[0.0, SIZE / 4 - 1, SIZE // 4]] * ranks


def test_each_rank_has_it_on_its_own_gpu_and_a_context_nowhere_else(result: Any, ranks: int) -> None:
    assert result["devices"] == [f"cuda:{rank}" for rank in range(ranks)]
    assert result["contexts"] == [[rank] for rank in range(ranks)]
    assert result["own_contexts"] == [0]


def test_every_gpu_grows_by_one_payload_however_many_ranks_there_are(result: Any, ranks: int) -> None:
    assert result["growth"] == [SIZE] * ranks  # GPU 0 as well: its own rank's copy


def test_a_router_opens_nothing(result: Any) -> None:
    contexts, is_initialized, mapped = result["router"]
    assert (contexts, is_initialized, mapped) == ([], False, 0)


def test_a_process_that_owns_cpu_puts_and_gets_on_the_host_without_a_context(result: Any) -> None:
    devices, contexts, is_initialized, last = result["loader"]
    assert devices == ["cpu", "cpu"]
    assert (contexts, is_initialized) == ([], False)
    assert last == SIZE / 4 - 1


def test_only_processes_that_use_cuda_pin_memory(result: Any, ranks: int) -> None:
    assert result["registering"] == sorted(result["pids"])  # the sender and the ranks, not the router or the loader
    assert len(result["pids"]) == ranks + 1


def test_the_lease_has_ended_when_all_have_read(result: Any) -> None:
    assert result["usage"] == {"in_use": 0, "peak": SIZE + 4096, "leases": 0}


def test_everything_is_given_back_after_close_to_the_byte(result: Any, ranks: int) -> None:
    assert result["after"] == {"allocated": 0, "in_use": 0}
    assert result["left"] == {"growth": [0] * ranks, "ranks": [True] * ranks, "own": True, "shm": []}
