"""Finding a program on PATH, and replacing this process with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devguard.cli import program
from tests.helpers.simulated import ROOT


def test_a_program_on_path_is_found() -> None:
    assert program.find("run", "sh") == shutil.which("sh")


def test_a_missing_program_is_reported_under_the_name_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.find("sim", "no-such-program") is None
    assert capsys.readouterr().err == "devguard sim: there is no program 'no-such-program' on PATH\n"
    monkeypatch.setenv("PATH", "")
    assert program.find("sim", "torchrun") is None
    assert "python -m torch.distributed.run" in capsys.readouterr().err


def test_a_program_that_cannot_be_run_has_the_exit_status_of_a_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    assert program.become("run", str(text), [str(text)], {}) == program.NOT_RUNNABLE == 126
    assert capsys.readouterr().err == f"devguard run: {text} cannot be run: Permission denied\n"


def test_become_replaces_the_process_and_flushes_its_output() -> None:
    code = """
import os
from devguard.cli import program
from tests.helpers.simulated import ROOT
print("before", os.getpid())
program.become("run", "/bin/sh", ["sh", "-c", "echo $WORD $$; exit 5"], {"WORD": "after"})
"""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    before, after = (line.split() for line in done.stdout.splitlines())
    assert (done.returncode, before[0], after[0]) == (5, "before", "after")
    assert before[1] == after[1]


def test_the_program_ends_when_nothing_reads_its_output() -> None:
    code = "from devguard.cli import program; program.become('run', '/bin/sh', ['sh', '-c', 'yes | head -1'], {})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "y\n", "")
