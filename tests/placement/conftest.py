"""Run this folder's tests on simulated GPUs, with any build of torch.

The tests are collected here and run, file by file, in a child pytest on `GPUS` simulated GPUs. The parent replays the
child's report of each test. In the child, and where the simulation is already active, the tests run directly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devguard import simgpu
from tests.helpers import simulated

GPUS = 4
HERE = Path(__file__).parent
REPORTS = "DEVGUARD_TEST_REPORTS"

_finished: set[Path] = set()
_reports: dict[str, list[Any]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise the timeout in the parent, where the first test of a file waits for the child to run the whole file."""
    for item in items:
        if not simgpu.active() and HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Replay the reports of the child, unless this is the child."""
    if simgpu.active() or HERE not in item.path.parents:  # pytest calls this hook for every test
        return None
    if item.path not in _finished:  # one child for each file
        _finished.add(item.path)
        _reports.update(_run_all([other for other in item.session.items if other.path == item.path], item.config))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports.pop(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_all(items: list[pytest.Item], config: pytest.Config) -> dict[str, list[Any]]:
    environment = simulated.sim_environment(GPUS)
    environment[REPORTS] = environment["DEVGUARD_SIM_STATE"] + ".reports"
    ids = [item.nodeid for item in items]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids]
    child = subprocess.run(
        command,
        env=environment,
        cwd=config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    reports: dict[str, list[Any]] = {nodeid: [] for nodeid in ids}
    path = Path(environment[REPORTS])
    for line in path.read_text().splitlines() if path.exists() else ():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        reports[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in reports[item.nodeid]):
            output = f"pytest on simulated GPUs stopped before the end of this test:\n{child.stdout[-8000:]}"
            reports[item.nodeid].append(
                pytest.TestReport(item.nodeid, item.location, {}, "failed", output, "teardown", [])
            )
    return reports


class _Reporter:
    """Write each report of the child as a line of JSON."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the reporter, if this is the child."""
    if REPORTS in os.environ and not session.config.pluginmanager.has_plugin("devguard-reporter"):
        session.config.pluginmanager.register(_Reporter(session.config), "devguard-reporter")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Close the doors, clear the journal and make device 0 current; afterwards, check that no scope is left."""
    import torch

    import devguard
    from devguard.reporting.journal import journal

    devguard.uninstall()
    journal.clear()
    torch.cuda.set_device(0)
    yield
    assert devguard.uninstall() == []
    assert devguard.owner() is None, "the test left a scope entered"
