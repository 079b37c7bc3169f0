"""Failures of devguard itself: a warning or a record, while the program goes on."""

from __future__ import annotations

import ast
import inspect
import io
import logging
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.support import notices
from devguard.support.notices import Failures

ROOT = Path(__file__).parents[2]


class FailingStream:
    """A standard error whose every use fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class AsciiStream(io.StringIO):
    """A standard error that cannot encode."""

    def write(self, text: str) -> int:
        raise UnicodeEncodeError("ascii", text, 0, 1, "")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "closed": closed_stream,
    "failing": FailingStream,
    "no encoding": AsciiStream,
    "no stream": object,
}


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


class TestWarnings:
    """`warn_user`, whatever the program has done to its warnings and its standard error."""

    @pytest.fixture(params=["error", "broken showwarning", "broken stack"], autouse=True)
    def obstacle(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        def fail(*args: object, **kwargs: object) -> None:
            raise LookupError("showwarning")

        monkeypatch.setattr(warnings, "filters", list(warnings.filters))
        warnings.simplefilter("error" if request.param == "error" else "always")
        if request.param == "broken showwarning":
            monkeypatch.setattr(warnings, "showwarning", fail)
        elif request.param == "broken stack":
            monkeypatch.setattr(warnings, "warn", fail)
            monkeypatch.setattr(warnings, "warn_explicit", fail)
        return str(request.param)

    def test_the_text_is_printed_on_standard_error(self, capfd: pytest.CaptureFixture[str]) -> None:
        notices.warn_user("devguard: text")
        assert capfd.readouterr() == ("", "devguard: text\n")

    def test_a_warning_at_a_line_names_it(self, capfd: pytest.CaptureFixture[str]) -> None:
        notices.warn_user("text", StrayDeviceWarning, ("program.py", 7))
        assert capfd.readouterr() == ("", "program.py:7: StrayDeviceWarning: text\n")

    @pytest.mark.parametrize("stream", STREAMS)
    def test_a_broken_standard_error_does_not_matter(
        self, stream: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
        notices.warn_user("devguard: text")
        notices.warn_user("devguard: text", at=("program.py", 7))
        assert capfd.readouterr().out == ""

    def test_without_standard_error_the_logger_gets_the_text(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        notices.warn_user("devguard: text")
        assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
            ("devguard", "WARNING", "devguard: text")
        ]


class TestAlerts:
    @pytest.fixture(autouse=True)
    def no_earlier_alerts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(notices, "_alerts", {})
        monkeypatch.setattr(notices, "_listeners", {})

    @pytest.mark.parametrize("action", ["ignore", "error", "always"])
    def test_an_alert_is_shown_whatever_the_filter_and_once(
        self, action: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            notices.alert("devguard is off: a")
            notices.alert("devguard is off: a")
            notices.alert("devguard is off: b")
        assert capfd.readouterr() == ("", "devguard is off: a\ndevguard is off: b\n")
        assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
            ("devguard", "ERROR", "devguard is off: a"),
            ("devguard", "ERROR", "devguard is off: b"),
        ]
        assert notices.alerts() == ("devguard is off: a", "devguard is off: b")

    @pytest.mark.parametrize("stream", STREAMS)
    def test_a_broken_standard_error_does_not_keep_the_logger_from_it(
        self,
        stream: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(sys, "stderr", STREAMS[stream]())
        notices.alert("devguard is off")
        assert capfd.readouterr().out == ""
        assert [record.message for record in caplog.records] == ["devguard is off"]

    def test_a_handler_that_raises_does_not_matter(self, capfd: pytest.CaptureFixture[str]) -> None:
        class Broken(logging.Handler):
            def handle(self, record: logging.LogRecord) -> bool:
                raise LookupError("handler")

        handler = Broken()
        logging.getLogger("devguard").addHandler(handler)
        try:
            notices.alert("devguard is off")
            notices.log("text", notices.ERROR)
        finally:
            logging.getLogger("devguard").removeHandler(handler)
        assert capfd.readouterr() == ("", "devguard is off\n")

    def test_listeners_get_each_text_until_they_stop(self) -> None:
        heard: list[str] = []

        def fail(text: str) -> None:
            raise LookupError(text)

        notices.on_alert(fail)
        notices.on_alert(heard.append)
        notices.alert("a")
        notices.stop_on_alert(heard.append)
        notices.alert("b")
        assert heard == ["a"]

    def test_the_number_of_texts_is_limited(self, capfd: pytest.CaptureFixture[str]) -> None:
        for number in range(notices.MAX_ALERTS + 10):
            notices.alert(f"{number}")
        assert len(notices.alerts()) == notices.MAX_ALERTS


class TestRecords:
    """`log_at` and `is_logged`."""

    def test_a_record_lies_where_it_belongs_and_has_the_fields(self, caplog: pytest.LogCaptureFixture) -> None:
        notices.log_at(("program.py", 7, "work"), "100 %s", notices.WARNING, {"devguard_door": "load"})
        (record,) = caplog.records
        assert (record.name, record.pathname, record.lineno, record.funcName) == ("devguard", "program.py", 7, "work")
        assert (record.getMessage(), record.levelname) == ("100 %s", "WARNING")
        assert record.devguard_door == "load"  # type: ignore[attr-defined]

    def test_a_field_that_would_overwrite_one_of_logging_loses_the_record_only(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        notices.log_at(("program.py", 7, "work"), "text", notices.WARNING, {"message": "other"})
        assert caplog.records == []

    def test_the_level_and_the_handlers_of_the_program_decide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logger = logging.getLogger("devguard")
        monkeypatch.setattr(logger, "propagate", False)
        assert not notices.is_logged(notices.ERROR)
        monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
        monkeypatch.setattr(logger, "level", logging.WARNING)
        logger.manager._clear_cache()  # type: ignore[attr-defined]
        assert [notices.is_logged(level) for level in (notices.ERROR, notices.WARNING, notices.INFO)] == [1, 1, 0]
        monkeypatch.setattr(logger, "disabled", True)
        assert not notices.is_logged(notices.ERROR)
        monkeypatch.undo()
        logger.manager._clear_cache()  # type: ignore[attr-defined]


PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from devguard.support import notices
notices.warn_user("devguard: warned")
notices.alert("devguard: alerted")
notices.flush()
"""


@pytest.mark.parametrize("options", [[], ["-W", "error"], ["-W", "ignore"], ["-O"], ["-X", "dev"]])
@pytest.mark.parametrize("closed", ["", "2>&-", ">&- 2>&-"])
def test_a_program_with_closed_streams_gets_nothing_on_standard_output(options: list[str], closed: str) -> None:
    command = shlex.join([sys.executable, *options, "-c", PROGRAM, str(ROOT)])
    done = subprocess.run(["sh", "-c", f"exec {command} {closed}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert ("devguard: alerted" in done.stderr) == (closed == "")


@pytest.mark.parametrize("path", sorted((ROOT / "devguard").rglob("*.py")), ids=lambda path: str(path.name))
def test_no_other_module_warns_or_prints_on_standard_error(path: Path) -> None:
    if path.name in ("notices.py", "autoload.py"):  # autoload also reports that notices cannot be imported
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    written = [ast.unparse(call) for call in calls]
    forbidden = (
        "warnings.warn(",
        "warnings.warn_explicit(",
        "sys.stderr.write",
        "logging.getLogger",
        "sys.stderr.flush",
    )
    assert not [text for text in written if text.startswith(forbidden)]
    assert not [text for text in written if text.startswith("print(") and "sys.stderr" in text]
