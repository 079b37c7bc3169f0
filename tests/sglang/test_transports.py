"""Tensors that SGLang's processes receive land on their own GPU: SGLang 0.5.23's own code, on simulated GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.simulated import Finished, run_simulated
from tests.sglang.environment import OLDEST, POSSIBLE, sglang_environment

pytestmark = [
    pytest.mark.skipif(not POSSIBLE, reason="SGLang 0.5.23 needs Python 3.11"),
    pytest.mark.timeout(600),  # The first test installs SGLang.
]

TO_ALL = {"zmq", "unpickler", "msgpack"}
TO_SCHEDULERS = TO_ALL | {"serializer", "broadcast"}
TO_THE_FIRST = TO_SCHEDULERS | {"point to point", "relayed by zmq", "relayed by msgpack"}


def crew(folder: Path, roads: str, ranks: int, **variables: str) -> Finished:
    environment = sglang_environment(ranks + 1, folder=folder)
    environment |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **variables}
    return run_simulated(["-m", "tests.sglang.crew", roads, str(ranks)], env=environment, timeout=540)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Without DEVGUARD: unguarded, with the decorator, and with SGLang's plugin."""
    return crew(tmp_path_factory.mktemp("sglang"), "none,decorator,plugin", 2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """With DEVGUARD alone; SGLang's loader may load no plugin."""
    folder = tmp_path_factory.mktemp("sglang")
    return crew(folder, "environment", 4, DEVGUARD="repair", SGLANG_PLUGINS="none")


def test_unguarded_every_process_has_a_context_and_bytes_on_gpu_0(two_ranks: Finished) -> None:
    processes = two_ranks.result["none"]
    assert set(processes) == {"scheduler 0", "scheduler 1", "controller", "detokenizer"}
    for name, process in processes.items():
        assert set(process["devices"].values()) == {"cuda:0"}, name
        assert "cuda:0" in process["contexts"], name
        assert process["bytes"]["cuda:0"] > 0, name


@pytest.mark.parametrize("road", ["decorator", "plugin"])
def test_with_decorator_or_plugin_no_process_touches_a_foreign_gpu(two_ranks: Finished, road: str) -> None:
    check(two_ranks.result[road], 2)


def test_with_the_environment_alone_no_process_touches_a_foreign_gpu(four_ranks: Finished) -> None:
    check(four_ranks.result["environment"], 4)


def check(processes: dict[str, Any], ranks: int) -> None:
    assert len(processes) == ranks + 2
    for rank in range(ranks):
        own = f"cuda:{rank + 1}"
        process = processes[f"scheduler {rank}"]
        assert process["owner"] == own
        assert set(process["devices"].values()) == {own}
        assert process["contexts"] == [own]
        assert list(process["bytes"]) == [own]
        expected = TO_THE_FIRST if rank == 0 else TO_SCHEDULERS | ({"point to point"} if rank == 1 else set())
        assert set(process["devices"]) == expected
    for name in ("controller", "detokenizer"):
        devices = dict.fromkeys(TO_ALL, "cpu")
        assert processes[name] == {"devices": devices, "contexts": [], "bytes": {}, "owner": "cpu"}


def test_each_process_logs_its_owner(two_ranks: Finished, four_ranks: Finished) -> None:
    for log, ranks in ((two_ranks.stderr, 2), (four_ranks.stderr, 4)):
        lines = [line.partition("devguard: ")[2] for line in log.splitlines() if " owns " in line]
        # A set, because the decorator arms its process too: its controller and detokenizer log the same line.
        assert {line.partition(", doors ")[0] for line in lines} == {
            *(f"scheduler TP{rank % 2} owns cuda:{rank + 1}, mode repair" for rank in range(ranks)),
            "data-parallel controller owns cpu, mode repair",
            "detokenizer owns cpu, mode repair",
        }
        assert all("ipc" in line and "load" in line for line in lines)
        assert "NOT guarded" not in log


def test_sglangs_loader_loads_the_plugin_without_an_error(two_ranks: Finished) -> None:
    assert "Failed to" not in two_ranks.stderr  # The schedulers assert that it applies the hook.


@pytest.mark.parametrize(
    ("road", "second"),
    [("none", [["cuda:0", "cuda:0"], ["cuda:0", "cuda:1"]]), ("decorator", [["cuda:1", "cuda:1"], ["cuda:1"]])],
)
def test_the_decorator_repairs_the_original_bug_in_its_last_release(
    tmp_path: Path, road: str, second: list[Any]
) -> None:
    environment = sglang_environment(2, release=OLDEST, folder=tmp_path)
    reports = run_simulated(["-m", "tests.sglang.older_crew", road, tmp_path], env=environment).result
    assert json.loads(json.dumps(reports)) == [[0, ["cuda:0", "cuda:0"], ["cuda:0"]], [1, *second]]
