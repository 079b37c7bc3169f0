"""The summary of a session."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest

from devguard.testing.findings import Finding
from devguard.testing.guarding import ATTRIBUTE, OUTSIDE
from devguard.testing.report import Report

FOUND = Finding("load", "cuda:0, owner cuda:1: observed", "observed", 1, 8, "loader.py:7 in load", "load(x)", "Fix it.")


class Terminal:
    """The lines that would be written to the terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(f"== {title}")

    def write_line(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def report() -> Report:
    config: Any = types.SimpleNamespace(stash=pytest.Stash())
    return Report(config, None)


def collect(report: Report, name: str, *findings: Finding) -> None:
    plain: Any = types.SimpleNamespace(nodeid=name, **{ATTRIBUTE: [finding.as_dict() for finding in findings]})
    report.pytest_runtest_logreport(plain)


def summary(report: Report) -> list[str]:
    terminal = Terminal()
    report.pytest_terminal_summary(terminal)
    return terminal.lines


def test_a_session_without_findings_has_no_summary(report: Report) -> None:
    collect(report, "test_a")
    assert summary(report) == []


def test_the_findings_of_one_call_site_are_one_paragraph(report: Report) -> None:
    for number in range(5):
        collect(report, f"test_{number}", FOUND)
    assert summary(report) == [
        "== devguard: 5 findings in 5 tests",
        "loader.py:7 in load: 5 x, 40 bytes",
        "    load(x)",
        "  load: cuda:0, owner cuda:1: observed",
        "  in test_0, test_1, test_2 and 2 more",
    ]


def test_different_findings_of_one_call_site_are_one_paragraph(report: Report) -> None:
    collect(report, "test_a", FOUND, dataclasses.replace(FOUND, text="cuda:2, owner cuda:1: observed", bytes=90))
    collect(report, "test_b", dataclasses.replace(FOUND, kind="native", text="cuda:0", bytes=0))
    collect(report, "test_b", dataclasses.replace(FOUND, where="", source="", text="lost", bytes=0))
    collect(report, "test_b", dataclasses.replace(FOUND, where="", source="", text="lost, too", bytes=0))
    assert summary(report) == [
        "== devguard: 5 findings in 2 tests",
        "loader.py:7 in load: 3 x, 98 bytes",
        "    load(x)",
        "  load: cuda:2, owner cuda:1: observed [1 x]",
        "  load: cuda:0, owner cuda:1: observed [1 x]",
        "  native: cuda:0 [1 x]",
        "  in test_a, test_b",
        "no line of user code: 1 x",
        "  load: lost",
        "  in test_b",
        "no line of user code: 1 x",
        "  load: lost, too",
        "  in test_b",
    ]


def test_the_finding_with_the_most_bytes_comes_first(report: Report) -> None:
    for nbytes in (1, 99):
        collect(report, "test_a", dataclasses.replace(FOUND, bytes=nbytes, where=f"loader.py:{nbytes} in load"))
    assert [line for line in summary(report) if " x, " in line] == [
        "loader.py:99 in load: 1 x, 99 bytes",
        "loader.py:1 in load: 1 x, 1 bytes",
    ]


def test_findings_outside_every_test_are_reported_for_each_process(report: Report) -> None:
    report._config.stash[OUTSIDE] = [FOUND.as_dict()]
    report.pytest_testnodedown(types.SimpleNamespace(workeroutput={ATTRIBUTE: [FOUND.as_dict()]}))
    report.pytest_testnodedown(types.SimpleNamespace())  # a worker that was killed
    lines = summary(report)
    assert lines[0] == "== devguard: 2 findings outside every test"
    assert lines[-1] == "  outside every test"
