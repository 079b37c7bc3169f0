"""The examples of devguard.transport print their .out file without a GPU, and .gpus.out on simulated GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.simulated import ROOT

EXAMPLES = sorted((ROOT / "examples" / "transport").glob("*.py"))
ON_GPUS = [path for path in EXAMPLES if "devguard sim" in path.read_text(encoding="utf-8")]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="transport needs Linux")


def lines(output: str) -> list[str]:
    """Return the lines sorted: several processes print them."""
    return sorted(output.splitlines())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_without_a_gpu(example: Path) -> None:
    # Unbuffered, a line and its end are two writes, and another process may write between them.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-W", "error", example],
        env={**environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert lines(done.stdout) == lines(example.with_suffix(".out").read_text(encoding="utf-8"))


@pytest.mark.parametrize("example", ON_GPUS, ids=lambda path: path.stem)
def test_an_example_runs_on_simulated_gpus(
    run_simulated: Callable[..., Any], example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    done = run_simulated(["-W", "error", example], gpus=4)
    assert done.stderr == ""
    assert lines(done.stdout) == lines(example.with_suffix(".gpus.out").read_text(encoding="utf-8"))
    held = [[device.index for device in process.devices if device.context] for process in done.state]
    assert all(len(devices) <= 1 for devices in held)  # each process is on its own GPU only
