"""Failures of devguard itself: a warning or a record, while the program goes on."""

from __future__ import annotations

import inspect
import warnings

import pytest

from devguard.errors import StrayDeviceError
from devguard.support import notices
from devguard.support.notices import Failures


def fail() -> None:
    raise LookupError("no such attribute")


def report() -> None:
    notices.warn_user("devguard is off")


def test_the_warning_names_the_line_that_called_the_reporting_function() -> None:
    with pytest.warns(RuntimeWarning, match="devguard is off") as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        report()
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_a_warning_that_would_be_an_error_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report()
    assert capsys.readouterr().err == "devguard is off\n"


def test_safely_returns_the_result_and_records_errors() -> None:
    failures = Failures()
    assert failures.safely(len, "abc") == 3
    assert failures.safely(fail) is None
    assert list(failures) == ["LookupError: no such attribute"]
    failures.clear()
    assert list(failures) == []


def test_safely_does_not_catch_verdicts() -> None:
    failures = Failures(StrayDeviceError)

    def refuse() -> None:
        raise StrayDeviceError("cuda:0")

    with pytest.raises(StrayDeviceError):
        failures.safely(refuse)
    assert list(failures) == []


def test_only_the_first_errors_are_recorded() -> None:
    failures = Failures()
    for number in range(100):
        failures.record(LookupError(number))
    assert list(failures) == [f"LookupError: {number}" for number in range(notices.MAX_FAILURES)]
