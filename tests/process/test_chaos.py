"""A short run of ``python -m tests.chaos``, and the faults that it has to find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
BOUND_S = 200


def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the chaos; return its status, its figures, and what it printed on standard error."""
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=BOUND_S, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="transport needs Linux")
def test_rounds_of_faults_leave_nothing_wrong_and_nothing_behind() -> None:
    status, figures, printed = run("--rounds", "15", "--bound", "60")
    assert status == 0, printed
    assert (figures["rounds"], figures["wrong"], figures["stuck"], figures["other_faults"]) == (15, 0, 0, 0)
    assert figures["counts"]["read: ok"] > 50
    assert "15/15 rounds" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="transport needs Linux")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_chaos_finds_a_fault(mutant: str) -> None:
    status, figures, printed = run("--rounds", "100", "--bound", "5", "--mutant", mutant)
    assert status == 1, printed
    assert figures["wrong"] + figures["stuck"] == 1
    assert f"Again: python -m tests.chaos --seed 0 --first {figures['rounds']} --rounds 1" in printed
