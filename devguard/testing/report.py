"""The header line and the summary, in the process that writes to the terminal: under xdist, the controller.

A summary is written only if there are findings: one paragraph per call site, most bytes first, with the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from devguard import simgpu
from devguard.support.installed_torch import import_torch
from devguard.support.terminal import list_some
from devguard.testing.findings import Finding
from devguard.testing.guarding import ATTRIBUTE, OUTSIDE, Guarding
from devguard.testing.options import Options

__all__ = ["Report"]

_TESTS_SHOWN = 3
_OUTSIDE_NAME = "outside every test"


class Report:
    """The header line and the summary of a session."""

    def __init__(self, config: pytest.Config, options: Options | None) -> None:
        self._config = config
        self._options = options
        self._rows: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}

    def pytest_report_header(self) -> str | None:
        """Return the mode and the owner, or why nothing is guarded."""
        simulated = _describe_simulation()
        if self._options is None:
            return f"devguard: tests are not guarded; {simulated}" if simulated else None
        mode = ", ".join([self._options.mode, *(f"{door}={value}" for door, value in self._options.doors.items())])
        guarding = self._config.pluginmanager.get_plugin("devguard-guarding")
        if not isinstance(guarding, Guarding):
            return f"devguard: mode {mode}; nothing runs"
        if guarding.problem:
            return f"devguard: nothing is guarded in mode {mode}: {guarding.problem}"
        if guarding.owner is None:
            return f"devguard: mode {mode}, each xdist worker owns one GPU{simulated and f'; {simulated}'}"
        return f"devguard: mode {mode}, owner {guarding.owner.tag}; {simulated or _describe_devices()}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the findings of a test."""
        self._gather(getattr(report, ATTRIBUTE, ()), report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Collect the strays of an xdist worker outside its tests."""
        self._gather(getattr(node, "workeroutput", {}).get(ATTRIBUTE, ()), _OUTSIDE_NAME)

    def _gather(self, findings: Any, name: str) -> None:
        for plain in findings:
            finding = Finding(**plain)
            key = (finding.kind, finding.where, finding.text)
            known, names = self._rows.get(key, (None, []))
            if known is not None:
                plain = {**plain, "count": known.count + finding.count, "bytes": known.bytes + finding.bytes}
            self._rows[key] = (Finding(**plain), names if name in names else [*names, name])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write the summary, if there are findings."""
        self._gather(self._config.stash.get(OUTSIDE, ()), _OUTSIDE_NAME)
        if not self._rows:
            return
        sites: dict[tuple[str, ...], list[tuple[Finding, list[str]]]] = {}
        for key, row in self._rows.items():
            sites.setdefault((row[0].where,) if row[0].where else key, []).append(row)
        total = sum(finding.count for finding, _ in self._rows.values())
        tests = {name for _, names in self._rows.values() for name in names if name != _OUTSIDE_NAME}
        where = f"in {_plural(len(tests), 'test')}" if tests else _OUTSIDE_NAME
        terminalreporter.section(f"devguard: {_plural(total, 'finding')} {where}")
        for rows in sorted(sites.values(), key=lambda rows: -sum(finding.bytes for finding, _ in rows)):
            _write_site(rows, terminalreporter.write_line)


def _write_site(rows: list[tuple[Finding, list[str]]], write: Callable[[str], None]) -> None:
    """Write the paragraph of one call site."""
    first = rows[0][0]
    count, nbytes = sum(finding.count for finding, _ in rows), sum(finding.bytes for finding, _ in rows)
    names = list(dict.fromkeys(name for _, names in rows for name in names))
    size = f", {nbytes} bytes" if nbytes else ""
    write(f"{first.where or 'no line of user code'}: {count} x{size}")
    if first.source:
        write(f"    {first.source}")
    for finding, _ in sorted(rows, key=lambda row: -row[0].bytes):
        write(f"  {finding.kind}: {finding.text}{f' [{finding.count} x]' if len(rows) > 1 else ''}")
    write(f"  in {list_some(names, _TESTS_SHOWN)}" if names != [_OUTSIDE_NAME] else f"  {_OUTSIDE_NAME}")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _describe_simulation() -> str:
    """Return the number of simulated GPUs, in words; empty if there are none."""
    if not simgpu.active():
        return ""
    number = int(os.environ["DEVGUARD_SIM_GPUS"])
    real = " (this machine's real GPUs are not used)" if os.path.exists("/dev/nvidiactl") else ""
    return f"{_plural(number, 'simulated GPU')}{real}"


def _describe_devices() -> str:
    """Return the number of GPUs, in words. torch is imported already."""
    from devguard.support import accelerator

    torch = import_torch()
    count = accelerator.device_count()
    if count:
        return _plural(count, "GPU")
    reason = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
    return f"{reason}, so only work that names a GPU can be found (simulated ones: --devguard-gpus 4)"
