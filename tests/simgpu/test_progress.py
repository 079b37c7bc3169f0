"""The progress of a build, on standard error."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from devguard.simgpu import progress
from devguard.simgpu.progress import Reporter


def run(reporter: Reporter, folder: Path, status: int) -> int:
    with (
        reporter.steps(),
        subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({status})"]) as process,
    ):
        return reporter.run(process, "downloading torch", folder, 1000)


def test_without_a_terminal_each_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(enabled=True)
    assert run(reporter, tmp_path, 3) == 3
    reporter.say("done")
    assert capsys.readouterr() == ("", "devguard: downloading torch\ndevguard: done\n")


def test_a_disabled_reporter_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(enabled=False)
    reporter.say("done")
    assert run(reporter, tmp_path, 0) == 0
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(Reporter(enabled=True), tmp_path, 5) == 5
    assert "downloading torch" in sys.stderr.getvalue()
    assert "100%" in sys.stderr.getvalue()
