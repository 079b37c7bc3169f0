"""Every example prints the text of its .out file on simulated GPUs; without GPUs it prints how to run it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import simulated
from tests.helpers.simulated import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_out_file(run_simulated, example):
    done = run_simulated(["-W", "error", example], gpus=2)
    assert done.stdout == example.with_suffix(".out").read_text(encoding="utf-8")
    assert done.stderr == ""


def test_an_example_without_gpus_prints_how_to_run_it():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "find_the_line.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    command = "devguard sim --gpus 2 -- python examples/find_the_line.py"
    assert done.stderr == f"Two GPUs are needed. To simulate them: {command}\n"


@pytest.mark.skipif(not simulated.POSSIBLE, reason="simulated GPUs exist for Linux on x86-64 only")
def test_the_example_of_a_test_suite_prints_its_out_file():
    suite = ROOT / "examples" / "pytest" / "test_placement.py"
    command = next(line for line in suite.read_text().splitlines() if line.startswith("    pytest ")).split()
    # Under CI pytest does not shorten the lines of its summary.
    dropped = ("PYTEST_", "CI", "BUILD_NUMBER")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    output, _, time = done.stdout.rstrip().rpartition(" in ")
    assert f"{output}\n" == suite.with_suffix(".out").read_text(), time
