"""Finding the C compiler, and running it."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from devguard.errors import SimulationError
from devguard.support import compiler


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, without programs."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def make(folder: Path, name: str) -> str:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_the_first_known_compiler_on_path_is_found(programs: Path) -> None:
    clang = make(programs, "clang")
    assert compiler.find("simulated GPUs", SimulationError) == clang
    gcc = make(programs, "gcc")
    assert compiler.find("simulated GPUs", SimulationError) == gcc


def test_cc_names_the_compiler(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(programs, "cc")
    monkeypatch.setenv("CC", make(programs, "special"))
    assert compiler.find("simulated GPUs", SimulationError) == str(programs / "special")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SimulationError, match="CC=no-such-compiler"):
        compiler.find("simulated GPUs", SimulationError)


def test_a_missing_compiler_is_an_error_of_the_callers_class_with_a_remedy(programs: Path) -> None:
    with pytest.raises(SimulationError, match=r"^simulated GPUs need a C compiler.*apt install gcc"):
        compiler.find("simulated GPUs", SimulationError)


def test_a_missing_tool_is_an_error_that_names_it(programs: Path) -> None:
    make(programs, "cc")
    with pytest.raises(SimulationError, match="need readelf: install binutils"):
        compiler.find("simulated GPUs", SimulationError, tools=("readelf",))


def test_run_returns_the_output_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    command = [sys.executable, "-c", "import os; print(os.environ['LC_ALL'])"]
    assert compiler.run(command, "the source", SimulationError) == "C\n"


def test_a_failing_step_is_an_error_with_the_end_of_its_output() -> None:
    code = "import sys; sys.exit('\\n'.join(f'line {number}' for number in range(9)))"
    with pytest.raises(SimulationError, match="the source could not be compiled") as caught:
        compiler.run([sys.executable, "-c", code], "the source", SimulationError)
    assert "line 8" in str(caught.value)
    assert "line 2" not in str(caught.value)


def test_a_full_disk_is_an_os_error() -> None:
    code = "import sys; sys.exit('fatal error: No space left on device')"
    with pytest.raises(OSError, match="No space left") as caught:
        compiler.run([sys.executable, "-c", code], "the source", SimulationError)
    assert caught.value.errno == errno.ENOSPC
