"""Runs pytest in subprocesses: on a suite with planted strays (planted/), and on small suites (`pytester`)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from devguard.simgpu import overlay
from tests.helpers import simulated

collect_ignore = ["planted"]
PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(scope="session")
def cache_folder() -> str:
    """The folder of the simulated GPUs, looked up early because `pytester` moves the home folder."""
    return str(overlay.cache_folder().parent)


@pytest.fixture(autouse=True)
def _surroundings(cache_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this run's own plugin and launcher out of the inner runs."""
    for name in list(os.environ):
        if name.startswith(("DEVGUARD_SIM", "PYTEST_XDIST")) or name in ("DEVGUARD", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")  # its import takes as long as torch's
    monkeypatch.setenv("DEVGUARD_CACHE_DIR", cache_folder)
    monkeypatch.setenv("PYTHONPATH", str(simulated.ROOT))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of the planted suite."""

    returncode: int
    stdout: str
    failures: dict[str, str]  # test function -> message and text of its failure or error
    errors: frozenset[str]  # the failures that happened in setup or teardown
    passed: frozenset[str]


@pytest.fixture(scope="session")
def planted(cache_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``planted(*arguments)`` runs the planted suite on four simulated GPUs, once for each set of arguments."""
    if not simulated.POSSIBLE:
        pytest.skip("simulated GPUs exist for Linux on x86-64 only")
    overlay.prepare(progress=False)  # A build inside a run would write to its standard error, which must stay empty.
    runs: dict[tuple[str, ...], Run] = {}

    def run(*arguments: str) -> Run:
        if arguments not in runs:
            runs[arguments] = _run(arguments, tmp_path_factory.mktemp("planted") / "junit.xml")
        return runs[arguments]

    return run


def _run(arguments: tuple[str, ...], junit: Path) -> Run:
    options = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-c", os.devnull, "--rootdir", "."]
    options += [f"--junitxml={junit}", "--devguard-gpus=4"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=PLANTED, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    failures, errors, passed = {}, set(), set()
    for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
        name = case.attrib["name"]
        problems = [child for child in case if child.tag in ("failure", "error")]
        if problems:
            failures[name] = "\n".join(f"{child.attrib['message']}\n{child.text}" for child in problems)
            errors |= {name for child in problems if child.tag == "error"}
        elif case.find("skipped") is None:
            passed.add(name)
    return Run(done.returncode, done.stdout, failures, frozenset(errors), frozenset(passed))
