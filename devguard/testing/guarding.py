"""Guards every test, and fails it for what it did: the part of the plugin that runs where tests run.

The process's owner is installed for the whole session, so that imports, fixtures of every scope and threads that
outlive a test are guarded as well, and what a test says itself (a guard, ``install``) goes before it. A marker's own
device or mode is a guard around the phases of that test.

In mode ``error`` a stray raises at its line. What only its end can tell (swallowed errors, the current device,
contexts, what was left behind) fails the test in its own phase, unless it has failed by itself: then it is a section
of its report. The other modes only report.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from types import TracebackType
from typing import Any

import pytest

from devguard import modes
from devguard.activation.install import install, uninstall
from devguard.errors import DevGuardError, StrayDeviceError
from devguard.guards.guard import guard
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.support import allocation_history, callsite
from devguard.testing import fixtures, markers
from devguard.testing.findings import LEFT_BEHIND, Finding, describe, headline, of_stray
from devguard.testing.options import Options
from devguard.testing.watch import PLACED, Watch

__all__ = ["ATTRIBUTE", "Guarding"]

ATTRIBUTE = "devguard"  # of a test's report, and the key in an xdist worker's output
_AFTERWARDS = frozenset({"first_touch", "native"})  # doors that know only when it is too late to refuse

_Phase = Generator[None, Any, Any]


class _Test:
    """One test while it runs: its watch, its findings until a report takes them, and what to undo at its end."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.watch: Watch | None = None
        self.findings: list[Finding] = []
        self.failure: BaseException | None = None
        self.undo = contextlib.ExitStack()

    def fails_for(self, finding: Finding) -> bool:
        """Tell whether the test fails for this, in its mode."""
        if finding.action == LEFT_BEHIND:
            return self.options.mode == "error"
        mode = self.options.doors.get(finding.kind, self.options.mode)
        return mode == "error" and (finding.action == "refused" or finding.kind in _AFTERWARDS)


_TEST = pytest.StashKey[_Test]()


class Guarding:
    """The hooks that guard tests; one object a session, in each process that runs tests."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._options = options
        self._owner: Owner | None = None
        self.problem = ""  # why nothing is guarded

    @property
    def owner(self) -> Owner | None:
        """Who owns the tests of this process; None if nothing is guarded."""
        return self._owner

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Install the owner, before anything is collected."""
        if session.config.pluginmanager.hasplugin("dsession"):
            return  # tests run in the workers of xdist
        if modes.killed():
            self.problem = "DEVGUARD=off forbids it"
            return
        try:
            self._owner = fixtures.of_process(os.environ)
            self._install()
        except (ImportError, OSError) as error:  # no torch, or one that cannot be imported; also too old a torch
            self._owner, self.problem = None, str(error)
        except DevGuardError as error:
            raise pytest.UsageError(f"--devguard={self._options.mode}: {error}") from None

    def _install(self) -> None:
        install(self._options.mode, self._owner and self._owner.tag, doors=self._options.doors)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Leave torch as it was found."""
        if self._owner is None:
            return
        self._tell_outside()
        allocation_history.stop()
        uninstall()
        self._owner = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> _Phase:
        """Begin to watch a test, in the guard that its markers ask for."""
        if self._owner is None:
            return (yield)
        self._tell_outside()
        if process.owner is not self._owner or process.mode != self._options.mode:
            self._install()  # an earlier test has installed or uninstalled something itself
        problem = ""
        if _TEST in item.stash:  # it runs once more: plugins repeat what has failed
            del item.stash[_TEST]
        try:
            self._begin(item, self._owner)
        except DevGuardError as error:
            problem = str(error)
        result = yield from self._phase(item)
        if problem:  # not before: pytest's own plugins count on every setup
            pytest.fail(problem, pytrace=False)
        return result

    def _begin(self, item: pytest.Item, owner: Owner) -> None:
        """Do what the markers of a test ask for, and begin to watch it."""
        said = markers.of(item)
        test = item.stash[_TEST] = _Test(self._options if said.mode is None else Options(said.mode, {}))
        test.undo.enter_context(allowlist.scoped())
        if said.allow:
            allowlist.allow(*said.allow)
        watch = Watch(item, self._config.rootpath, repairs=test.options.mode in ("repair", "error"))
        item.stash[fixtures.MARK] = journal.mark()
        test.undo.callback(watch.end)
        if said.device is not None or said.mode is not None:
            own = guard((said.device or owner).tag, mode=said.mode)
            own.__enter__()
            test.undo.callback(_leave, own)
        if test.options.mode != "off":
            test.watch = watch

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> _Phase:
        """Watch the test itself, and fail it for what it did."""
        test = item.stash.get(_TEST, None)
        if test is not None and test.watch is not None:
            test.watch.begin_call()
        return (yield from self._phase(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> _Phase:
        """Watch the end of the fixtures, and leave the test's own guard."""
        try:
            return (yield from self._phase(item))
        finally:
            test = item.stash.get(_TEST, None)
            if test is not None:
                test.undo.close()
                journal.clear()

    def _phase(self, item: pytest.Item) -> _Phase:
        """Run one phase; look at what was found, and raise if the test is to fail for it."""
        test = item.stash.get(_TEST, None)
        try:
            result = yield
        except BaseException as error:
            self._shorten(error)
            if test is not None and test.watch is not None:
                test.findings += test.watch.look()
            raise
        if test is not None and test.watch is not None:
            test.findings += test.watch.look()
            self._fail(test)
        return result

    @staticmethod
    def _fail(test: _Test) -> None:
        """Fail a test for its findings, if there is one that it fails for."""
        fatal = [finding for finding in test.findings if test.fails_for(finding)]
        if fatal:
            try:
                pytest.fail(f"devguard: {headline(fatal)}\n{describe(fatal)}", pytrace=False)
            except BaseException as failure:
                test.failure = failure
                raise

    def _shorten(self, error: BaseException) -> None:
        """Let the traceback of a stray end at the line of the user's that did it; ``--full-trace`` keeps all."""
        if not isinstance(error, StrayDeviceError) or self._config.option.fulltrace:
            return
        last: TracebackType | None = None
        step = error.__traceback__
        while step is not None:
            if callsite.is_user(step.tb_frame.f_code):
                last = step
            step = step.tb_next
        if last is not None:
            last.tb_next = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> _Phase:
        """Put the findings on the report; into a section, where the test has failed by itself."""
        test = item.stash.get(_TEST, None)
        own = getattr(item, "_excinfo", None)  # unittest keeps a test's failures until the report is made
        for excinfo in own or ():
            self._shorten(excinfo.value)
        error = own[0].value if own else call.excinfo and call.excinfo.value
        report = yield
        if test is None or not test.findings:
            return report
        findings, test.findings = test.findings, []
        setattr(report, ATTRIBUTE, [finding.as_dict() for finding in findings])
        told = str(error) if isinstance(error, StrayDeviceError) else ""
        more = [finding for finding in findings if not finding.where or finding.where not in told]
        if report.failed and error is not test.failure and more:
            report.sections.append(("devguard", describe(more)))
        return report

    def _tell_outside(self) -> None:
        """Keep what strayed between two tests, or before the first: as modules are imported, for one."""
        strays = [stray for stray in journal.strays() if stray.action != PLACED]
        if not strays:
            return
        found = [of_stray(stray, self._config.rootpath).as_dict() for stray in strays]
        journal.clear()
        self._config.stash.setdefault(OUTSIDE, []).extend(found)
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput.setdefault(ATTRIBUTE, []).extend(found)


OUTSIDE = pytest.StashKey[list[dict[str, Any]]]()  # what strayed outside every test


def _leave(own: guard) -> None:
    """Leave a scope; an error that it would raise is in the journal already."""
    with contextlib.suppress(StrayDeviceError):
        own.__exit__(None, None, None)
