"""The log of processes on simulated GPUs that end without warning: their owners and contexts are in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devguard.logs import reader as log_reader
from tests.helpers.simulated import ROOT

ENDS = ("os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(1)")
PROGRAMS = {
    "inside a guard": ('with devguard.guard("cuda:1"): x = torch.ones(1, device="cuda"); {end}', {}),
    "after a guard": ('with devguard.guard("cuda:1"): x = torch.ones(1, device="cuda")\n{end}', {}),
    "install": ('devguard.install("repair", 1); x = torch.ones(1, device="cuda"); {end}', {}),
    "a launched rank": (
        'torch.cuda.set_device(1); x = torch.ones(1, device="cuda"); {end}',
        {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    ),
    "a forked worker": (
        'pid = os.fork()\nif pid == 0:\n    devguard.install("repair", 1); x = torch.ones(1, device="cuda"); {end}\n'
        "os.waitpid(pid, 0)",
        {},
    ),
    "contexts that only a collection sees": (
        'devguard.install("repair", 1); x = torch.ones(1, device="cuda")\n'
        "log_file.FLUSH_INTERVAL_S = 0\ngc.collect(); {end}",
        {},
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_owner_and_the_contexts_of_a_killed_process_are_in_its_log(program: str, end: str, tmp_path: Path) -> None:
    code, variables = PROGRAMS[program]
    environ = {**os.environ, **variables, "DEVGUARD": "repair", "DEVGUARD_LOG": str(tmp_path)}
    before = "import gc, os, signal, torch, devguard\nfrom devguard.reporting import log_file\n"
    subprocess.run([sys.executable, "-c", before + code.format(end=end)], cwd=ROOT, env=environ, check=False)
    processes, _, damaged = log_reader.read(tmp_path)
    assert damaged == []
    killed = [process for process in processes if not process.ended]
    assert [(process.owner, process.contexts) for process in killed] == [("cuda:1", ["cuda:1"])]
