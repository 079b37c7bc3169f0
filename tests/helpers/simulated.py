"""Run programs on simulated GPUs: `run_simulated`, and its result, `Finished`.

The version of torch is this environment's, or the one that DEVGUARD_TEST_TORCH names (tests/torch_versions.py sets it).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devguard import simgpu

ROOT = Path(__file__).parents[2]
POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A program that ran on simulated GPUs."""

    returncode: int
    stdout: str
    stderr: str
    pid: int
    state: tuple[simgpu.ProcessState, ...]
    log: tuple[str, ...]  # empty unless the environment names a log

    @property
    def me(self) -> simgpu.ProcessState:
        """The state of the program, without its children."""
        return next(process for process in self.state if process.pid == self.pid)

    @property
    def result(self) -> Any:
        """The last line of the output, which is JSON."""
        return json.loads(self.stdout.splitlines()[-1])


def sim_environment(
    gpus: int = 2,
    *,
    folder: str | os.PathLike[str] | None = None,
    base: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, str]:
    """Return an environment with a new state file and a log; the options are those of `devguard.simgpu.environment`."""
    place = Path(tempfile.mkdtemp(prefix="devguard-test-", dir=folder))
    variables = dict(os.environ if base is None else base)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    options.setdefault("torch", os.environ.get("DEVGUARD_TEST_TORCH") or None)
    options.setdefault("state", place / "state")
    options.setdefault("log", place / "log")
    return simgpu.environment(gpus, base=variables, **options)


def run_simulated(
    program: str | Sequence[str | os.PathLike[str]],
    *,
    gpus: int = 2,
    env: Mapping[str, str] | None = None,
    input: bytes = b"",
    check: bool = True,
    timeout: float = 240,
    **options: Any,
) -> Finished:
    """Run Python code (a string), or Python with these arguments (a sequence), on simulated GPUs, and wait.

    ``env`` comes from `sim_environment`; by default a new one is made from ``gpus`` and ``options``. With ``check``, an
    exit status other than 0 raises an `AssertionError` with the program's output.
    """
    variables = dict(env) if env is not None else sim_environment(gpus, **options)
    arguments = ["-c", textwrap.dedent(program)] if isinstance(program, str) else [os.fspath(word) for word in program]
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        cwd=ROOT,
    ) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    log = Path(variables.get("DEVGUARD_SIM_LOG", os.devnull))
    done = Finished(
        process.returncode,
        out.decode(errors="replace"),
        err.decode(errors="replace"),
        process.pid,
        simgpu.state(variables["DEVGUARD_SIM_STATE"]),
        tuple(log.read_text(errors="replace").splitlines()) if log.exists() else (),
    )
    if check and done.returncode:
        raise AssertionError(
            f"the program on simulated GPUs exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done
