"""The test suites of other projects: their sources, and a single run of one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers import simulated
from tests.others import sources

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
STDLIB = "DEVGUARD_OTHERS_STDLIB"  # As in bootstrap.py; importing that would import torch here.
TIMEOUT = 1800.0
SIMULATED_GPUS = 2


@dataclasses.dataclass(frozen=True)
class Suite:
    """A test suite of another project.

    Attributes
    ----------
    name : str
        The name of the project, or of the module of CPython's package ``test``.
    version : str
        The release with the tests; empty for CPython's tests.
    targets : tuple of str
        For pytest, files in the source distribution; for unittest, names.
    paths : tuple of str
        The folders of the source distribution that belong on the import path.
    requires : tuple of str
        Further requirements, at exact versions.
    folder : str
        The folder of the source distribution that its tests expect to run in.
    scripts : bool
        Whether the tests are programs, each for a separate process; otherwise they are pytest's.
    """

    name: str
    version: str = ""
    targets: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    folder: str = "."
    scripts: bool = False

    @property
    def about(self) -> str:
        """The name and version."""
        return f"{self.name} {self.version or 'of Python ' + sys.version.split()[0]}"

    def missing(self) -> str | None:
        """Return which of CPython's tests this Python lacks, or None."""
        if self.version:
            return None
        folders = [Path(spec.origin).parent] if (spec := importlib.util.find_spec("test")) and spec.origin else []
        folders += [Path(os.environ[STDLIB], "test")] if os.environ.get(STDLIB) else []
        if any((folder / f"{self.name}.py").exists() or (folder / self.name).is_dir() for folder in folders):
            return None
        return (
            f"this Python has no test.{self.name}: set {STDLIB} to a folder that has test/{self.name}.py of Python "
            f"{sys.version_info[0]}.{sys.version_info[1]}, such as CPython's Lib or Debian's libpython3.x-testsuite"
        )


_SAFETENSORS = ("simple", "pt_comparison", "pt_model", "threadable", "multithreaded", "handle", "pread_backend")

SUITES = {
    suite.name: suite
    for suite in (
        Suite("test_pickle"),
        Suite("test_threading"),
        Suite("test_threading_local"),
        # The last release with its tests in the source distribution.
        Suite(
            "cloudpickle",
            "2.2.1",
            ("tests/cloudpickle_test.py", "tests/cloudpickle_file_test.py", "tests/test_backward_compat.py"),
            (".", "tests/cloudpickle_testpkg"),
            ("psutil==7.1.3",),
        ),
        Suite("dill", "0.4.1", ("dill/tests",), (".",), scripts=True),
        Suite(
            "safetensors",
            "0.8.0",
            tuple(f"tests/test_{name}.py" for name in _SAFETENSORS),
            ("wheels",),
            ("safetensors==0.8.0",),
            "bindings/python",
        ),
        Suite("test_concurrent_futures"),
        Suite("joblib", "1.6.0", ("joblib/test",), (".",), ("psutil==7.1.3",)),
    )
}


@dataclasses.dataclass
class Run:
    """The result of one run of a suite."""

    outcomes: dict[str, str]
    details: dict[str, str]
    guard: dict[str, dict[str, Any]]  # Keys: before, after.
    children: list[dict[str, Any]]  # Those that multiprocessing spawned.
    seconds: float
    returncode: int
    output: str


def run(suite: Suite, owner: str, guarded: bool, targets: tuple[str, ...] = ()) -> Run:
    """Run a suite once, in a temporary folder.

    Parameters
    ----------
    suite : Suite
        The suite to run.
    owner : str
        The owner, ``cpu`` or ``cuda:1``; for ``cuda:1``, torch's CUDA build runs on simulated GPUs.
    guarded : bool
        Whether devguard is active.
    targets : tuple of str, optional
        The only tests to run.
    """
    with tempfile.TemporaryDirectory(prefix="devguard-others-") as scratch:
        root = work = Path(scratch, "work")
        work.mkdir()
        runner, arguments = "unittest", list(targets or (f"test.{suite.name}",))
        if suite.version:
            root = sources.unpack(sources.sdist(suite.name, suite.version), work)
            if suite.requires:  # Inside the suite, because its tests start Python with another import path.
                place = root / suite.paths[0]
                place.mkdir(exist_ok=True)
                for entry in sources.installed(suite.requires).iterdir():
                    (place / entry.name).symlink_to(entry)
            work = root / suite.folder
            chosen = targets or suite.targets
            runner, arguments = "pytest", ["--rootdir", str(work), *chosen]
            if suite.scripts:
                runner, arguments = "scripts", list(chosen)
        environment = _environment(suite, owner, guarded, root, Path(scratch))
        results, output = Path(scratch, "results"), Path(scratch, "output")
        results.touch()
        command = [sys.executable, str(BOOTSTRAP), str(results), runner, *arguments]
        start = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                returncode = process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                returncode = -signal.SIGKILL
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # Also ends processes that the tests left running.
                process.wait()
        seconds = time.monotonic() - start
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        tests = [row for row in rows if "test" in row]
        return Run(
            {row["test"]: row["outcome"] for row in tests},
            {row["test"]: row["detail"] for row in tests},
            {row["guard"]: row for row in rows if row.get("guard") in ("before", "after")},
            [row for row in rows if row.get("guard") == "child"],
            seconds,
            returncode,
            output.read_text(errors="replace")[-20000:],
        )


def _environment(suite: Suite, owner: str, guarded: bool, root: Path, scratch: Path) -> dict[str, str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith(("DEVGUARD", "PYTEST_"))}
    kept = [name for name in ("DEVGUARD_CACHE_DIR", STDLIB) if name in os.environ]
    base.update({name: os.environ[name] for name in kept})
    if owner == "cpu":
        base["PYTHONPATH"] = os.pathsep.join(filter(None, [str(simulated.ROOT), base.get("PYTHONPATH")]))
    else:
        base = simulated.sim_environment(SIMULATED_GPUS, folder=scratch, base=base)
    first = [str(root / folder) for folder in suite.paths]
    base["PYTHONPATH"] = os.pathsep.join([*first, base["PYTHONPATH"]])
    base["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if guarded:
        base.update(DEVGUARD="repair", DEVGUARD_DEVICE=owner)
    return base
