"""The examples of launchers and frameworks, on simulated GPUs: their output, and the GPUs that each process touched."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from typing import Any

import pytest

from tests.helpers.simulated import ROOT

LAUNCHERS = ROOT / "examples" / "launchers"
RUN = ["-m", "devguard", "run", "--"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def expected_output(example: str) -> str:
    return (LAUNCHERS / f"{example}.out").read_text(encoding="utf-8")


def touched(state: Any) -> list[list[int]]:
    """Return, for each process that held a context, the GPUs on which it held one."""
    held = [[index for index, device in enumerate(process.devices) if device.context] for process in state]
    return sorted(devices for devices in held if devices)


@pytest.fixture
def environ(sim_environment: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return sim_environment


def test_torchrun_processes_on_two_nodes_own_the_gpu_of_their_local_rank(run_simulated: Any, environ: Any) -> None:
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    node += ["--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    both = '"$@" --node-rank 1 "$0" & "$@" --node-rank 0 "$0" && wait $!'
    command = ["sh", "-c", both, LAUNCHERS / "with_torchrun.py", *node]
    done = run_simulated([*RUN, *command], env=environ(2))
    assert done.stdout == expected_output("with_torchrun")
    assert touched(done.state) == [[0], [0], [1], [1]]


def test_accelerate_processes_stay_on_their_gpus(run_simulated: Any, environ: Any) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", free_port(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = run_simulated([*RUN, *launch, "--num_machines", "1", LAUNCHERS / "with_accelerate.py"], env=environ(2))
    assert done.stdout == expected_output("with_accelerate")
    assert touched(done.state) == [[0], [1]]


def test_lightning_fabric_processes_stay_on_their_gpus_without_local_world_size(
    run_simulated: Any, environ: Any
) -> None:
    done = run_simulated([*RUN, sys.executable, LAUNCHERS / "with_fabric.py"], env=environ(2))
    assert done.stdout == expected_output("with_fabric")
    assert touched(done.state) == [[0], [1]]


def test_ray_actors_and_tasks_are_guarded_by_the_environment(run_simulated: Any, environ: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # Short, because Ray's sockets lie there.
        env = environ(2) | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        done = run_simulated([LAUNCHERS / "with_ray.py"], env=env)
    assert done.stdout == expected_output("with_ray")


def test_workers_of_a_stand_in_for_vllm_stay_on_their_gpus(run_simulated: Any, environ: Any) -> None:
    standin = str(ROOT / "tests" / "integrations" / "standin")
    base = {**os.environ, "PYTHONPATH": os.pathsep.join([standin, os.environ.get("PYTHONPATH", "")])}
    done = run_simulated([*RUN, sys.executable, LAUNCHERS / "with_vllm.py", "model"], env=environ(2, base=base))
    assert done.stdout == expected_output("with_vllm")
    assert touched(done.state) == [[0], [0], [1]]  # The program, which made the batch, and the workers.
