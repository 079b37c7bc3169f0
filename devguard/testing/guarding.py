"""Guards every test and fails it for its strays: the part of the plugin that runs in the process of the tests.

The process's owner is installed for the whole session, so imports, fixtures of every scope and threads that outlive a
test are guarded as well. A guard or ``install`` inside a test takes precedence. A device or mode from a marker becomes
a guard around the phases of that test.

In mode ``error`` a stray raises at its line. Findings that are known only at the end of a phase (swallowed errors, the
current device, contexts, anything left behind) fail the test in that phase; if the test has already failed, they
become a section of its report. The other modes only report.
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
from devguard.testing.findings import LEFT_BEHIND, Finding, describe, from_stray, headline
from devguard.testing.options import Options
from devguard.testing.watch import PLACED, Watch

__all__ = ["ATTRIBUTE", "Guarding"]

ATTRIBUTE = "devguard"  # the attribute of a test's report, and the key in an xdist worker's output
_AFTERWARDS = frozenset({"first_touch", "native"})  # doors that notice a stray too late to refuse it

_Phase = Generator[None, Any, Any]


class _Test:
    """One running test: its watch, its findings until a report takes them, and what to undo when it ends."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.watch: Watch | None = None
        self.findings: list[Finding] = []
        self.failure: BaseException | None = None
        self.undo = contextlib.ExitStack()

    def is_fatal(self, finding: Finding) -> bool:
        """Return whether the test fails for this finding, in its mode."""
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
        self.problem = ""  # the reason, if nothing is guarded

    @property
    def owner(self) -> Owner | None:
        """The owner of the tests in this process; None if nothing is guarded."""
        return self._owner

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Install the owner before collection starts."""
        if session.config.pluginmanager.hasplugin("dsession"):
            return  # The tests run in xdist's workers.
        if modes.is_killed():
            self.problem = "DEVGUARD=off is set"
            return
        try:
            self._owner = fixtures.owner_of_process(os.environ)
            self._install()
        except (ImportError, OSError) as error:  # torch is missing, too old, or fails to import
            self._owner, self.problem = None, str(error)
        except DevGuardError as error:
            raise pytest.UsageError(f"--devguard={self._options.mode}: {error}") from None

    def _install(self) -> None:
        install(self._options.mode, self._owner and self._owner.tag, doors=self._options.doors)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Uninstall devguard, which leaves torch as it was found."""
        if self._owner is None:
            return
        self._keep_outside()
        allocation_history.stop()
        uninstall()
        self._owner = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> _Phase:
        """Start to watch a test, inside the guard that its markers request."""
        if self._owner is None:
            return (yield)
        self._keep_outside()
        if process.owner is not self._owner or process.mode != self._options.mode:
            self._install()  # An earlier test called install() or uninstall().
        problem = ""
        if _TEST in item.stash:  # The test runs again: some plugins repeat failed tests.
            del item.stash[_TEST]
        try:
            self._start_watch(item, self._owner)
        except DevGuardError as error:
            problem = str(error)
        result = yield from self._phase(item)
        if problem:  # Only now, because pytest's own plugins rely on every setup having run.
            pytest.fail(problem, pytrace=False)
        return result

    def _start_watch(self, item: pytest.Item, owner: Owner) -> None:
        """Apply the markers of a test, and start to watch it."""
        marked = markers.read(item)
        test = item.stash[_TEST] = _Test(self._options if marked.mode is None else Options(marked.mode, {}))
        test.undo.enter_context(allowlist.scoped())
        if marked.allow:
            allowlist.allow(*marked.allow)
        watch = Watch(item, self._config.rootpath, repairs=test.options.mode in ("repair", "error"))
        item.stash[fixtures.MARK] = journal.mark()
        test.undo.callback(watch.end)
        if marked.device is not None or marked.mode is not None:
            scope = guard((marked.device or owner).tag, mode=marked.mode)
            scope.__enter__()
            test.undo.callback(_exit, scope)
        if test.options.mode != "off":
            test.watch = watch

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> _Phase:
        """Watch the test itself, and fail it for its findings."""
        test = item.stash.get(_TEST, None)
        if test is not None and test.watch is not None:
            test.watch.start_call()
        return (yield from self._phase(item))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> _Phase:
        """Watch the teardown of the fixtures, and exit the test's own guard."""
        try:
            return (yield from self._phase(item))
        finally:
            test = item.stash.get(_TEST, None)
            if test is not None:
                test.undo.close()
                journal.clear()

    def _phase(self, item: pytest.Item) -> _Phase:
        """Run one phase, collect its findings, and raise if one of them is fatal."""
        test = item.stash.get(_TEST, None)
        try:
            result = yield
        except BaseException as error:
            self._shorten_traceback(error)
            if test is not None and test.watch is not None:
                test.findings += test.watch.look()
            raise
        if test is not None and test.watch is not None:
            test.findings += test.watch.look()
            self._fail(test)
        return result

    @staticmethod
    def _fail(test: _Test) -> None:
        """Fail a test if one of its findings is fatal."""
        fatal = [finding for finding in test.findings if test.is_fatal(finding)]
        if fatal:
            try:
                pytest.fail(f"devguard: {headline(fatal)}\n{describe(fatal)}", pytrace=False)
            except BaseException as failure:
                test.failure = failure
                raise

    def _shorten_traceback(self, error: BaseException) -> None:
        """Cut the traceback of a stray after the last line of user code; ``--full-trace`` keeps the whole traceback."""
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
        """Attach the findings to the report, and add them as a section if the test failed for another reason."""
        test = item.stash.get(_TEST, None)
        kept = getattr(item, "_excinfo", None)  # pytest keeps a unittest's failures here until it makes the report.
        for excinfo in kept or ():
            self._shorten_traceback(excinfo.value)
        error = kept[0].value if kept else call.excinfo and call.excinfo.value
        report = yield
        if test is None or not test.findings:
            return report
        findings, test.findings = test.findings, []
        setattr(report, ATTRIBUTE, [finding.as_dict() for finding in findings])
        message = str(error) if isinstance(error, StrayDeviceError) else ""
        more = [finding for finding in findings if not finding.where or finding.where not in message]
        if report.failed and error is not test.failure and more:
            report.sections.append(("devguard", describe(more)))
        return report

    def _keep_outside(self) -> None:
        """Keep the strays from before the first test and between tests, for example during imports."""
        strays = [stray for stray in journal.strays() if stray.action != PLACED]
        if not strays:
            return
        found = [from_stray(stray, self._config.rootpath).as_dict() for stray in strays]
        journal.clear()
        self._config.stash.setdefault(OUTSIDE, []).extend(found)
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput.setdefault(ATTRIBUTE, []).extend(found)


OUTSIDE = pytest.StashKey[list[dict[str, Any]]]()  # the strays outside every test


def _exit(scope: guard) -> None:
    """Exit a scope. The journal already holds any error that the exit raises."""
    with contextlib.suppress(StrayDeviceError):
        scope.__exit__(None, None, None)
