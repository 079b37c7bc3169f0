"""Fixtures of the tracing tests: traced programs on simulated GPUs, and small C programs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.simulated import Finished


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced program that ran on simulated GPUs."""

    done: Finished
    script: str
    records: list[dict[str, Any]]

    def lines(self, record: dict[str, Any]) -> list[str]:
        """Return the lines of the script on a record's stack, stripped, innermost first."""
        text = Path(self.script).read_text().splitlines()
        return [text[frame["line"] - 1].strip() for frame in record["stack"] if frame["file"] == self.script]

    @property
    def opened(self) -> list[tuple[int, int]]:
        """Process and device of each context in the log of the simulation, in order."""
        fields = [line.split() for line in self.done.log]
        return [(int(words[0]), int(words[2])) for words in fields if words[3] == "ctx_create"]


@pytest.fixture
def trace(
    sim_environment: Callable[..., dict[str, str]], run_simulated: Callable[..., Finished], tmp_path: Path
) -> Callable[..., Traced]:
    """``trace(source, *arguments, **variables)``: run a script under ``devguard run --trace-contexts --json``."""

    def run(source: str, *arguments: object, gpus: int = 2, check: bool = True, **variables: str) -> Traced:
        script, output = tmp_path / "program.py", tmp_path / "records"
        script.write_text(source)
        command = ["-m", "devguard", "run", "--trace-contexts", "--json", "--output", output, "--"]
        program = [sys.executable, "-W", "error", script, *map(str, arguments)]
        done = run_simulated([*command, *program], env=sim_environment(gpus) | variables, check=check)
        return Traced(done, str(script), [json.loads(line) for line in output.read_text().splitlines()])

    return run


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``compile_c(source, name, *options)``: compile a shared library, or with ``options`` a program."""
    folder = tmp_path_factory.mktemp("c")

    def compiled(source: str, name: str, *options: str) -> Path:
        code, result = folder / f"{name}.c", folder / name
        code.write_text(source)
        chosen = options or ("-shared", "-fPIC")
        subprocess.run(["cc", "-O1", str(code), "-o", str(result), *chosen, "-ldl", "-lpthread"], check=True)
        return result

    return compiled
