"""Programs on simulated GPUs are watched from outside: strays are seen, and repaired programs have none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.simulated import ROOT, sim_environment

RANK = """
import sys, torch, devguard
torch.cuda.set_device({rank})
own = torch.ones({rank} + 1 << 20, dtype=torch.uint8, device="cuda")
if {rank} == 1:
    torch.save(torch.ones(3 << 20, dtype=torch.uint8, device="cuda"), "{folder}/x.pt")
    torch.cuda.empty_cache()
    buffer = open("{folder}/x.pt", "rb").read().replace(b"cuda:1", b"cuda:0")
    import io
    stray = torch.load(io.BytesIO(buffer))
print("ready", flush=True)
sys.stdin.read()
"""
LINE = next(number for number, line in enumerate(RANK.splitlines(), 1) if "stray =" in line)


def ranks(count: int, folder: Path, environ: dict[str, str], mode: str) -> list[subprocess.Popen[str]]:
    """Start `count` ranks, each on its GPU; rank 1 loads a checkpoint of GPU 0. Return when all are ready."""
    processes = []
    for rank in range(count):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables = {**environ, **{name: str(value) for name, value in launcher.items()}}
        variables |= {"DEVGUARD": mode, "DEVGUARD_LOG": str(folder / "log")}
        command = [sys.executable, "-c", RANK.format(rank=rank, folder=folder)]
        processes.append(
            subprocess.Popen(command, env=variables, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return processes


def watch_once(folder: Path, *words: str) -> tuple[int, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, "-m", "devguard", "watch", "--once", "--json", str(folder / "log"), *words]
    done = subprocess.run(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(("count", "mode"), [(2, "observe"), (4, "observe"), (8, "observe"), (8, "repair")])
def test_a_stray_is_seen_from_outside_with_its_line_and_a_repaired_run_is_a_diagonal(
    count: int, mode: str, tmp_path: Path
) -> None:
    environ = sim_environment(count, folder=tmp_path)
    processes = ranks(count, tmp_path, environ, mode)
    try:
        status, found = watch_once(tmp_path)
    finally:
        for process in processes:
            process.communicate("")
    gpus = [gpu["uuid"] for gpu in found["gpus"]]
    verdicts = {
        process["name"]: {gpus.index(uuid): cell["verdict"] for uuid, cell in process["cells"].items()}
        for process in found["processes"]
    }
    expected = {f"rank {rank} python -c": {rank: "own"} for rank in range(count)}
    if mode == "observe":
        expected["rank 1 python -c"][0] = "STRAY"
    assert verdicts == expected
    assert status == (3 if mode == "observe" else 0)
    (stray,) = found["strays"]
    action = {"observe": "observed", "repair": "repaired"}[mode]
    assert (stray["door"], stray["action"], stray["bytes"]) == ("load", action, 3 << 20)
    assert (stray["pid"], stray["line"]) == (processes[1].pid, LINE)
