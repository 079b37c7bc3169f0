"""Run a test suite in a process that has imported torch: ``python bootstrap.py RESULTS RUNNER ARGUMENTS``.

RUNNER is ``pytest``, ``unittest``, or ``scripts`` (files that are programs; each runs in a forked process).

The environment (``DEVGUARD``) decides whether devguard is active. RESULTS gets one line of JSON for each test as it
ends, and the state of the guard before the first test and after the last. Children that `multiprocessing` spawns run
this file again as their main module, so they import torch too, like the children of a program that uses torch.

This file is run by path and imports nothing from the repository, because a suite may have its own package ``tests``.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import threading
import traceback
import types
import unittest
from pathlib import Path
from typing import Any

import torch

RESULTS = "DEVGUARD_OTHERS_RESULTS"
STDLIB = "DEVGUARD_OTHERS_STDLIB"  # A folder with the tests of CPython that this Python lacks.

_pid = os.getpid()


def write(**row: Any) -> None:
    """Append one line to the results, except in a process that a test has forked."""
    if os.getpid() == _pid:
        with open(os.environ[RESULTS], "a") as file:
            file.write(json.dumps(row) + "\n")


def write_guard(when: str) -> None:
    """Write the state of the guard in this process."""
    if not os.environ.get("DEVGUARD"):
        write(guard=when, owner=None, doors=0, closed=[], records=0)
        return
    import devguard

    # The thread may be recorded as a stray. It starts before `status` is read at first, and after it at last, so that
    # the two counts of strays differ only by those of the suite.
    placed = _device_of_a_thread() if when == "before" else None
    status, owner = devguard.status(), devguard.owner()
    doors = status["doors"]
    closed = sorted(name for name, row in doors.items() if not row["open"])
    failures = sorted(f"{name}: {text}" for name, row in doors.items() for text in row.get("failures", ()))
    write(
        guard=when,
        owner=owner and str(owner),
        doors=len(doors),
        closed=closed,
        records=status["strays"],
        failures=failures,
        mode=status["mode"],
        placed=placed or _device_of_a_thread(),
        devguard=devguard.__file__,
        torch=torch.__version__,
    )


def _device_of_a_thread() -> str | None:
    """Return the current device of a thread that starts now, or None if torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(f"cuda:{torch._C._cuda_getDevice()}"))
    thread.start()
    thread.join()
    return seen[0]


class Recorder:
    """Write the outcome of each test that pytest runs."""

    def __init__(self) -> None:
        self.outcome = ""
        self.detail = ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            write(test=report.nodeid, outcome="error", detail=str(report.longrepr)[-2000:])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self.outcome, self.detail = "", ""
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            self.detail = str(report.longrepr)[-2000:]
        elif report.when != "teardown" and (report.when == "call" or report.skipped):
            expected = hasattr(report, "wasxfail")
            self.outcome = ("xfailed" if report.skipped else "xpassed") if expected else report.outcome
        if report.when == "teardown":
            write(test=report.nodeid, outcome=self.outcome, detail=self.detail)


class Result(unittest.TestResult):
    """Write the outcome of each test that unittest runs; a test fails if one of its subtests fails."""

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.outcome, self.detail = "passed", ""

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        write(test=test.id(), outcome=self.outcome, detail=self.detail)

    def _note(self, outcome: str, test: Any, error: Any = None) -> None:
        detail = self._exc_info_to_string(error, test)[-2000:] if error else ""  # type: ignore[attr-defined]
        if isinstance(test, unittest.TestCase):
            self.outcome, self.detail = outcome, detail
        else:  # setUpClass, setUpModule and similar.
            write(test=test.id(), outcome=outcome, detail=detail)

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._note("error", test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._note("failed", test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note("failed", test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        if self.__dict__.get("outcome") in (None, "passed") or not isinstance(test, unittest.TestCase):
            self._note("skipped", test)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self._note("xfailed", test)

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self._note("xpassed", test)


def run_pytest(arguments: list[str]) -> int:
    import pytest

    return int(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=", *arguments], plugins=[Recorder()]))


def run_unittest(names: list[str]) -> int:
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    result = Result()
    suite.run(result)
    print(f"{result.testsRun} tests, {len(result.failures)} failures, {len(result.errors)} errors")
    return 0 if result.wasSuccessful() else 1


def run_scripts(names: list[str]) -> int:
    failed = 0
    for script in [path for name in names for path in (sorted(Path(name).glob("test_*.py")) or [Path(name)])]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os._exit(_run_script(script))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        failed += status != 0
        detail = f"exit status {status}; its error is in the output" if status else ""
        write(test=str(script), outcome="failed" if status else "passed", detail=detail)
    return min(failed, 1)


def _run_script(script: Path) -> int:
    sys.path.insert(0, str(script.parent.absolute()))
    sys.argv[:] = [str(script)]
    try:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = str(script)
        exec(compile(script.read_text(), str(script), "exec"), main.__dict__)
    except BaseException as error:  # noqa: BLE001 - the process prints the error and ends here
        traceback.print_exc()
        return (
            int(error.code or 0) if isinstance(error, SystemExit) and isinstance(error.code, (int, type(None))) else 1
        )
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if os.environ.get(STDLIB):
    importlib.import_module("test").__path__.append(str(Path(os.environ[STDLIB], "test")))  # In children too.

if __name__ == "__mp_main__":
    write_guard("child")

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    os.environ[RESULTS] = os.path.abspath(sys.argv[1])
    multiprocessing.set_forkserver_preload(["torch"])  # Otherwise each child imports torch again.
    write_guard("before")
    status = {"pytest": run_pytest, "unittest": run_unittest, "scripts": run_scripts}[sys.argv[2]](sys.argv[3:])
    write_guard("after")
    sys.exit(status)
