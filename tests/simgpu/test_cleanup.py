"""The temporary state file of simulated GPUs is gone when the processes that used it are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devguard.simgpu import cleanup
from tests.helpers.simulated import ROOT

LIMIT_S = 60
MAKE = """
import os, sys
from pathlib import Path
from devguard.simgpu import launch
state = launch._state_file(None, 8 << 30)
os.environ["DEVGUARD_SIM_STATE"] = str(state)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
ENDS = {
    "an orderly end": ("", 0),
    "SIGKILL": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "another program": ("import os; os.execv('/bin/true', ['true'])", 0),
}


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    """Start a process that makes a state file in `folder` and becomes `program`."""
    environ = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, program],
        cwd=ROOT,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def is_emptied(folder: Path) -> bool:
    """Wait until `folder` is empty; return whether that happened."""
    until = time.monotonic() + LIMIT_S
    while list(folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    return not list(folder.iterdir())


@pytest.mark.parametrize("end", ENDS)
def test_the_file_is_removed_however_the_program_ends(end: str, tmp_path: Path) -> None:
    program, status = ENDS[end]
    with start(f"import sys; print(1, flush=True); input()\n{program}", tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (folder,) = tmp_path.iterdir()
        assert [file.name for file in folder.iterdir()] == ["state"]
        process.communicate("\n")
    assert process.returncode == status
    assert is_emptied(tmp_path)


def test_the_program_has_no_child_that_it_did_not_start_and_its_streams_are_closed_at_its_end(tmp_path: Path) -> None:
    program = """
import os
try: print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError: print("no child")
"""
    with start(program, tmp_path) as process:
        assert process.communicate(timeout=LIMIT_S)[0] == "no child\n"
    assert is_emptied(tmp_path)


def test_the_file_stays_while_a_process_that_outlives_the_program_uses_it(tmp_path: Path) -> None:
    program = """
import subprocess, sys
code = "import sys; print(1, flush=True); sys.stdin.readline()"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
import os; os._exit(0)
"""
    with start(program, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdout.readline()
        process.wait()
        (folder,) = tmp_path.iterdir()
        assert (folder / "state").exists()
        process.stdin.write("\n")
        process.stdin.close()
    assert is_emptied(tmp_path)


HIDDEN = """
import ctypes, mmap, os, sys
if os.fork(): os._exit(0)  # a daemon: the program of `devguard sim` ends, the worker goes on
use = sys.argv[1]
file = open(os.environ["DEVGUARD_SIM_STATE"], "r+b")
mapped = mmap.mmap(file.fileno(), 4096) if use == "a map" else None
if use == "a map": file.close()
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[47]), int(fields[48])
ctypes.memset(start, 0, end - start)  # as setproctitle does, whose title overwrites the environment
print(1, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("use", ["a map", "a descriptor"])
def test_the_file_stays_while_a_process_without_an_environment_uses_it(use: str, tmp_path: Path) -> None:
    with start(HIDDEN.replace("sys.argv[1]", repr(use)), tmp_path) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.wait()
        (folder,) = tmp_path.iterdir()
        time.sleep(3 * cleanup.POLL_S)  # the cleaner looks at once, and then at these intervals
        assert (folder / "state").exists()
        process.stdin.write("\n")
        process.stdin.close()
    assert is_emptied(tmp_path)
