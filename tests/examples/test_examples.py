"""Every example prints what its .out file says, on simulated GPUs, and says what to do where there are none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulated import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_promises(run_simulated, example):
    done = run_simulated(["-W", "error", example], gpus=2)
    assert done.stdout == example.with_suffix(".out").read_text(encoding="utf-8")
    assert done.stderr == ""


def test_an_example_without_gpus_says_how_to_run_it():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "find_the_line.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "Two GPUs are needed. Without: devguard sim --gpus 2 -- python examples/find_the_line.py\n"
