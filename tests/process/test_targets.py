"""Decorated functions as targets of processes: they start, and are guarded in the child."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

import devguard
from devguard import StrayDeviceError
from tests.helpers import tagging
from tests.helpers.simulated import ROOT
from tests.process import workers

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))
GUARDED = {"owner": "cpu", "loaded": [0, 1, 2, 3], "strays": [("cuda:3", "cpu", "repaired")]}


@pytest.fixture(scope="module", params=["spawn", "forkserver"])
def context(request: pytest.FixtureRequest) -> Any:
    made = multiprocessing.get_context(request.param)
    if request.param == "forkserver":
        made.set_forkserver_preload(["torch", "tests.process.workers"])  # All children share one import of torch.
    return made


def in_child(context: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(queue, PAYLOAD, *args), kwargs=kwargs)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    (result,) = queue.get()
    queue.close()
    return result


def test_targets_of_every_kind_are_guarded_in_the_child(context: Any) -> None:
    worker = workers.Worker("w")
    targets: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (workers.decorated, {}, {}),
        (workers.decorated_by_argument, {"device": "cpu"}, {}),
        (worker.method, {}, {"name": "w"}),
        (worker.method_by_argument, {"device": torch.device("cpu")}, {"name": "w"}),
        (worker.static, {}, {}),
        (workers.Worker.static_outside, {}, {}),
        (workers.Worker.of_class, {}, {"name": "Worker"}),
        (workers.Worker.of_class_outside, {}, {"name": "Worker"}),
        (devguard.guard("cpu").bind(workers.undecorated), {}, {}),
        (devguard.guard("cpu").bind(worker.plain), {}, {"name": "w"}),
        (devguard.guard("cpu").bind(workers.decorated), {}, {}),
    ]
    queues = [context.SimpleQueue() for _ in targets]
    processes = []
    for queue, (target, options, _) in zip(queues, targets, strict=True):
        processes.append(context.Process(target=target, args=(queue, PAYLOAD), kwargs=options))
        if len(processes) % 2 == 0:  # Two at a time.
            for process in processes[-2:]:
                process.start()
            for process in processes[-2:]:
                process.join(120)
    processes[-1].start()
    processes[-1].join(120)
    assert [process.exitcode for process in processes] == [0] * len(targets)
    for queue, (_, _, more) in zip(queues, targets, strict=True):
        assert queue.get() == (GUARDED | more,)
        queue.close()


def test_without_a_guard_the_child_fails_to_load_the_pickle(context: Any) -> None:
    result = in_child(context, workers.undecorated)
    assert result["owner"] == "None"
    assert tagging.REFUSAL in result["loaded"]
    assert result["strays"] == []


def test_a_decorated_function_keeps_its_mode_in_the_child(context: Any) -> None:
    result = in_child(context, workers.decorated_to_refuse)
    assert "cuda:3" in result["loaded"]
    assert "owns cpu" in result["loaded"]
    assert result["strays"] == [("cuda:3", "cuda:3", "refused")]


def test_a_child_does_not_inherit_the_owner_of_its_parent(context: Any) -> None:
    devguard.install("repair", "cpu")
    with devguard.guard("cpu"):
        assert in_child(context, workers.undecorated)["owner"] == "None"


def test_pools_run_decorated_functions_and_return_errors_intact() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(workers.for_a_pool, PAYLOAD).result() == GUARDED
        assert pool.submit(devguard.guard("cpu").bind(workers.owner_of_child)).result() == "cpu"
        with pytest.raises(StrayDeviceError, match=r"cuda:3.*owns cpu.*workers\.py"):
            pool.submit(workers.raises_stray).result()


def script(*arguments: str) -> Any:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "main_script.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_functions_of_the_main_script_are_guarded_in_the_child(method: str, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(PAYLOAD)
    results = script(method, str(tmp_path / "payload"))
    assert set(results) == {"decorated", "by argument", "method", "class method", "bound"}
    for name, result in results.items():
        assert result == {"owner": "cpu", "loaded": [0, 1, 2, 3]}, name


def test_functions_pickled_by_value_are_guarded_in_the_child(tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(PAYLOAD)
    results = script("cloudpickle", str(tmp_path / "payload"))
    undecorated = results.pop("undecorated")
    assert undecorated["owner"] == "None"
    assert tagging.REFUSAL in undecorated["loaded"]
    assert set(results) == {
        "function",
        "closure",
        "lambda",
        "bound",
        "method",
        "coroutine",
        "generator",
        "async generator",
    }
    assert results["closure"].pop("here") == "closure"
    for name, result in results.items():
        assert result == {"owner": "cpu", "loaded": [0, 1, 2, 3]}, name


def test_cloudpickle_by_value_carries_the_scope_but_no_state_of_this_process() -> None:
    @devguard.guard("cpu", mode="observe", doors={"load": "repair"})
    def closure(payload: bytes) -> Any:
        return pickle.loads(payload).tolist(), str(devguard.owner())

    shipped = cloudpickle.loads(cloudpickle.dumps(closure))
    assert shipped is not closure
    assert shipped(PAYLOAD) == ([0, 1, 2, 3], "cpu")
    assert shipped.__wrapped__.__name__ == "closure"
