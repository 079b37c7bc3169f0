"""Choose the GPUs, run both passes as child processes, and combine their results.

This module does not import torch, because the calling environment may not have it. The child processes that need
torch run in the environment of the simulation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import devguard
from devguard import simgpu
from devguard.demo import DemoError
from devguard.errors import ConfigError

__all__ = ["choose", "make_importable", "run_both", "SAFE_PATH"]

DEFAULT_RANKS = 4
MAX_RANKS = 16  # the number of simulated devices
LIMIT = 600.0  # seconds for one pass; a pass that takes longer hangs
TAIL = 25  # lines of a failed process's output to show

# Variables that could change the owners in the processes of the demonstration.
FOREIGN = ("DEVGUARD", "LOCAL_", "SLURM_", "OMPI_", "MV2_", "MPI_", "PMI_", "PALS_")
# A child process imports nothing from the working folder, which may be a folder of others (Python 3.11 and newer).
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
FOREIGN_EXACT = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


@dataclass(frozen=True)
class Stage:
    """The GPUs on which the demonstration runs.

    Attributes
    ----------
    backend : str
        ``"real"`` or ``"simulated"``.
    ranks : int
        The number of ranks, one GPU each.
    reason : str
        The reason for this backend, as text for the user.
    """

    backend: str
    ranks: int
    reason: str


def make_importable(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ`, changed so that a child process can import this copy of devguard, even from a source tree."""
    kept = dict(environ)
    home = str(Path(devguard.__file__).parents[1])
    if home not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), home]))
    return kept


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without the variables of devguard and launchers, and with this copy of devguard importable."""
    return make_importable({name: value for name, value in environ.items() if not _is_foreign(name)})


def _is_foreign(name: str) -> bool:
    if name.startswith("DEVGUARD_SIM_"):
        return False  # The variables of an enclosing simulation, which provides the GPUs here.
    return name in FOREIGN_EXACT or name.startswith(FOREIGN)


def count_real(environ: Mapping[str, str]) -> int:
    """Return how many GPUs torch sees here. A child process imports torch, and only if there are GPU device files."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not any(Path(p).exists() for p in ("/dev/kfd", "/dev/dxg")):
        return 0
    return _count_with_torch(environ)


def _count_with_torch(environ: Mapping[str, str]) -> int:
    program = "import torch; print('devices', torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**environ, **SAFE_PATH},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0
    words = done.stdout.split()
    return int(words[-1]) if done.returncode == 0 and len(words) >= 2 and words[-2] == "devices" else 0


def choose(backend: str, ranks: int | None, torch: str | None) -> Stage:
    """Choose real or simulated GPUs, and the number of ranks.

    Parameters
    ----------
    backend : str
        ``"auto"``, ``"real"`` or ``"simulated"``.
    ranks : int or None
        The requested number. None means four, or fewer if there are two or three real GPUs.
    torch : str or None
        The requested version of torch for simulated GPUs.

    Raises
    ------
    ConfigError
        If the requests contradict each other, or there are too few real GPUs.
    """
    if ranks is not None and not 2 <= ranks <= MAX_RANKS:
        raise ConfigError(
            f"--ranks {ranks} is out of range. Valid: 2 to {MAX_RANKS}, because a stray needs a rank that does not own "
            "GPU 0."
        )
    if torch is not None and backend == "real":
        raise ConfigError("--torch selects the version for simulated GPUs. Leave it out with --backend real.")
    wanted = ranks or DEFAULT_RANKS
    if backend == "simulated":
        return Stage("simulated", wanted, "selected with --backend simulated")
    if torch is not None:
        return Stage("simulated", wanted, f"selected with --torch {torch}")
    if backend == "real":
        real = _count_with_torch(clean(os.environ))
        if real < max(2, ranks or 2):
            raise ConfigError(
                f"--backend real: torch sees {real} GPU(s) here, but {ranks or 'at least 2'} are needed. "
                "Use --backend simulated, which needs none."
            )
        reason = "selected with --backend real"
        if simgpu.active():
            reason += "; `devguard sim` simulates them"
        return Stage("real", ranks or min(DEFAULT_RANKS, real), reason)
    real = count_real(clean(os.environ))
    if real >= max(2, ranks or 2):
        return Stage("real", ranks or min(DEFAULT_RANKS, real), f"torch sees {real} GPUs here")
    if real:
        return Stage("simulated", wanted, f"torch sees {real} GPU(s) here, but {wanted} are needed")
    return Stage("simulated", wanted, "torch sees no GPU here")


def run_both(
    stage: Stage,
    images: Sequence[str],
    torch: str | None,
    prepare: Callable[..., dict[str, str]],
    on_stage: Callable[[str], None],
    transport: str = "pickle",
) -> dict[str, Any]:
    """Run the unguarded pass, then the guarded pass, each in new processes.

    Parameters
    ----------
    stage : Stage
        From `choose`.
    images : sequence of str
        Picture files; if empty, the built-in picture.
    torch : str or None
        The version of torch for simulated GPUs.
    prepare : callable
        `devguard.simgpu.environment`, called for simulated GPUs only.
    on_stage : callable
        Called with one line of text when a stage starts.
    transport : str
        How the guarded pass sends: ``"pickle"`` or ``"host"``. With ``"host"`` the costs of both passes are measured.

    Returns
    -------
    dict
        The data that ``devguard demo --json`` prints.
    """
    base = clean(os.environ)
    if stage.backend == "simulated":
        base.pop("CUDA_VISIBLE_DEVICES", None)  # It refers to the real GPUs.
    result: dict[str, Any] = {"backend": stage.backend, "reason": stage.reason, "ranks": stage.ranks}
    result["transport"] = transport
    passes = {}
    for name in ("unguarded", "guarded"):
        with tempfile.TemporaryDirectory(prefix="devguard-demo-") as folder:
            state = os.path.join(folder, "state") if stage.backend == "simulated" else None
            log = os.path.join(folder, "log") if state is not None and transport == "host" else None
            environment = base
            if state is not None:
                environment = prepare(stage.ranks, torch=torch, state=state, base=base, log=log)
            task = {
                "guarded": name == "guarded",
                "ranks": stage.ranks,
                "images": [os.path.abspath(image) for image in images],
                "folder": folder,
                "state": state,
                "transport": transport if name == "guarded" else "pickle",
                "measured": transport == "host",
                "log": log,
            }
            passes[name] = run_pass(task, environment, functools.partial(_report_stage, on_stage, name))
    for key in ("torch", "images", "request_bytes"):
        result[key] = passes["unguarded"][key]
        for done in passes.values():
            del done[key]
    return {**result, "devguard": devguard.__version__, **passes}


def _report_stage(on_stage: Callable[[str], None], name: str, text: str) -> None:
    on_stage(f"{name}: {text}")


def run_pass(
    task: Mapping[str, Any],
    environment: Mapping[str, str],
    on_stage: Callable[[str], None],
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Run one pass (`devguard.demo.scenario`) in a child process and return its result.

    Raises
    ------
    DemoError
        If the pass fails, dies, or takes longer than `limit` seconds. None of its processes is left running.
    """
    with tempfile.TemporaryFile() as output:
        reader, writer = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "devguard.demo.scenario", json.dumps({**task, "events": writer})],
                env={**environment, **SAFE_PATH},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                start_new_session=True,  # so that _end can kill all processes of the pass
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            outcome = _follow(reader, on_stage, limit)
            child.wait(limit)
        finally:
            os.close(reader)
            _end(child)
        if "result" in outcome:
            return dict(outcome["result"])
        if "error" in outcome:
            raise DemoError(str(outcome["error"]))
        raise DemoError(f"the tokenizer process ended with status {child.returncode}.{_format_tail(output)}")


def _follow(reader: int, on_stage: Callable[[str], None], limit: float) -> dict[str, Any]:
    """Read events until the pass has ended. Return its result or error event, or an empty dict if none arrived."""
    deadline = time.monotonic() + limit
    pending = b""
    outcome: dict[str, Any] = {}
    while True:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise DemoError(f"a pass took longer than {limit:g} s and was stopped. The machine may be overloaded.")
        read = os.read(reader, 1 << 16)
        if not read:
            return outcome
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "stage" in event:
                on_stage(event["stage"])
            else:
                outcome = event


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the child's session: the tokenizer, and ranks that outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _format_tail(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()[-TAIL:]
    return " Its last output:\n  " + "\n  ".join(lines) if lines else " It printed nothing."
