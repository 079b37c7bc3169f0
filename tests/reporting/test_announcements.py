"""Announcements: one log record and one call of each callback for a call site; neither breaks the program."""

from __future__ import annotations

import gc
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devguard
from devguard import Stray
from devguard.ownership.owner import CPU
from devguard.reporting import verdict
from devguard.reporting.announcements import LEVELS
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")

WAIT_S = 60.0


def stray(door: str = "load") -> bool:
    """Judge a stray at this line, for a scope that owns cpu."""
    return verdict.judge(door, "cuda:3", CPU, 8, "Do not.", target="cpu")


class Lines(logging.Handler):
    """A handler that keeps the records of the logger ``devguard``."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger, which accepts all levels, without handlers of its own before and after the test."""
    found = logging.getLogger("devguard")
    found.setLevel(logging.DEBUG)
    yield found
    found.setLevel(logging.NOTSET)
    for handler in list(found.handlers):
        found.removeHandler(handler)


@pytest.fixture
def lines(logger: logging.Logger) -> list[logging.LogRecord]:
    """All records of the logger."""
    handler = Lines()
    logger.addHandler(handler)
    return handler.records


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.001)


def finish(work: Callable[[], object]) -> None:
    """Run `work` on a thread, so that a deadlock fails the test instead of stopping all tests."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "deadlock"


class TestLogger:
    @pytest.mark.parametrize(
        ("mode", "level"),
        [("repair", logging.INFO), ("observe", logging.WARNING), ("warn", logging.DEBUG), ("error", logging.ERROR)],
    )
    def test_a_call_site_is_logged_once_at_the_level_of_what_was_done(
        self, mode: Any, level: int, lines: list[logging.LogRecord]
    ) -> None:
        with devguard.guard("cpu", mode=mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                try:
                    stray()
                except devguard.StrayDeviceError:
                    continue
        assert [(record.name, record.levelno) for record in lines] == [("devguard", level)]

    def test_what_is_no_stray_is_logged_for_debugging_only(self, lines: list[logging.LogRecord]) -> None:
        with devguard.guard("cpu"):
            verdict.obey("load", "cuda:3", CPU, 16)
            verdict.judge("threads", "cuda:3", CPU, 0, "", target="cpu", places=True)
        assert [(record.devguard_action, record.levelno) for record in lines] == [  # type: ignore[attr-defined]
            ("kept", logging.DEBUG),
            ("placed", logging.DEBUG),
        ]

    def test_every_action_has_a_level(self) -> None:
        from typing import get_args

        from devguard.reporting.stray import Action

        assert set(LEVELS) == set(get_args(Action))

    def test_a_record_lies_at_the_line_of_user_code_and_has_fields(
        self, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "5")
        journal.record(Occurrence("ipc", "cuda:0", "cuda:1", 24, note="a note"), "repaired", "cuda:1")
        (found,) = devguard.strays()
        (record,) = lines
        assert found.site is not None
        assert record.getMessage() == f"devguard: {found}"
        assert (record.pathname, record.lineno, record.funcName) == (__file__, found.site.line, found.site.function)
        assert {name: value for name, value in vars(record).items() if name.startswith("devguard")} == {
            "devguard_door": "ipc",
            "devguard_source": "cuda:0",
            "devguard_target": "cuda:1",
            "devguard_owner": "cuda:1",
            "devguard_action": "repaired",
            "devguard_bytes": 24,
            "devguard_file": __file__,
            "devguard_line": found.site.line,
            "devguard_function": found.site.function,
            "devguard_via": "",
            "devguard_rank": "5",
            "devguard_thread": "MainThread",
            "devguard_note": "a note",
        }

    def test_a_record_without_a_line_has_the_same_fields(self, lines: list[logging.LogRecord]) -> None:
        from devguard.support.callsite import Origin

        origin = Origin(None, 0, None, ())
        journal.record(Occurrence("native", "cuda:0", "cuda:1", origin=origin), "observed")
        (record,) = lines
        assert (record.devguard_file, record.devguard_line, record.devguard_rank) == ("", 0, "")  # type: ignore[attr-defined]
        assert "at no line of user code" in record.getMessage()

    def test_a_message_holds_no_escapes_and_no_second_line(self, lines: list[logging.LogRecord]) -> None:
        journal.record(Occurrence("load", "cuda:0", "cuda:1", note="50 %s\x1b[31m\nroot: all is well"), "observed")
        (record,) = lines
        assert record.getMessage().isprintable()
        assert r"50 %s\x1b[31m\nroot" in record.getMessage()

    def test_a_cleared_journal_logs_a_call_site_again(self, lines: list[logging.LogRecord]) -> None:
        with devguard.guard("cpu"):
            for _ in range(2):
                stray()
                journal.clear()
        assert len(lines) == 2

    def test_a_handler_that_raises_does_not_matter(
        self, logger: logging.Logger, capfd: pytest.CaptureFixture[str]
    ) -> None:
        class Broken(logging.Handler):
            def handle(self, record: logging.LogRecord) -> bool:
                raise LookupError("handler")

        logger.addHandler(Broken())
        with devguard.guard("cpu"):
            assert stray()
        assert capfd.readouterr() == ("", "")


BEFORE = """
import sys
import devguard
from devguard.reporting import verdict
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
def stray(action):
    journal.record(Occurrence("load", "cuda:0", "cuda:1", 8), action, "cuda:1" if action == "repaired" else None)
"""
STRAYS = "\nfor action in ('refused', 'observed', 'warned', 'repaired', 'kept', 'placed') * 2: stray(action)\n"


def run(code: str) -> tuple[str, str]:
    """Run a program without torch, where ``stray(action)`` records a stray; return what it prints."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", BEFORE + code], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


class TestPrograms:
    @pytest.mark.parametrize("setup", ["", "import logging", "import logging; logging.getLogger('app').info('x')"])
    def test_a_program_without_logging_prints_nothing(self, setup: str) -> None:
        assert run(setup + STRAYS) == ("", "")

    def test_a_program_without_logging_does_not_import_it(self) -> None:
        assert run(STRAYS + "print({'logging', 'torch', 'wrapt'} & set(sys.modules))")[0] == "set()\n"

    @pytest.mark.parametrize(
        ("level", "logged"), [("WARNING", ["refused", "observed"]), ("INFO", ["refused", "observed", "repaired"])]
    )
    def test_a_program_with_logging_finds_each_call_site_once_in_its_log(self, level: str, logged: list[str]) -> None:
        setup = f"import logging; logging.basicConfig(level='{level}', format='%(name)s %(devguard_action)s')"
        assert run(setup + STRAYS)[1].splitlines() == [f"devguard {action}" for action in logged]

    def test_captured_warnings_and_records_do_not_tell_one_stray_twice(self) -> None:
        code = """
import logging
logging.basicConfig(level="INFO", format="%(name)s %(levelname)s")
logging.captureWarnings(True)
verdict._enter(Occurrence("load", "cuda:0", "cuda:1", 8, sys._getframe()), "warned")
verdict._enter(Occurrence("load", "cuda:0", "cuda:1", 8, sys._getframe()), "kept", warns=True)
"""
        assert run(code)[1].splitlines() == ["py.warnings WARNING"] * 2

    def test_a_logger_that_is_switched_off_stays_silent(self) -> None:
        code = "import logging; logging.basicConfig(level=0); logging.getLogger('devguard').setLevel(60)"
        assert run(code + STRAYS) == ("", "")


class TestCallbacks:
    def test_a_callback_gets_each_call_site_once(self) -> None:
        found: list[Stray] = []
        with devguard.on_stray(found.append), devguard.guard("cpu"):
            for _ in range(3):
                stray()
            stray("jit")
            verdict.obey("load", "cuda:3", CPU, 16)  # kept, which is no stray
        assert [(each.door, each.action, each.count, each.bytes) for each in found] == [
            ("load", "repaired", 1, 8),
            ("jit", "repaired", 1, 8),
        ]
        assert [each.count for each in devguard.strays()] == [3, 1, 1]
        assert [each.site for each in found] == [each.site for each in devguard.strays()[:2]]

    def test_a_placed_thread_is_no_stray(self) -> None:
        found: list[Stray] = []
        with devguard.on_stray(found.append), devguard.guard("cpu"):
            verdict.judge("threads", "cuda:3", CPU, 0, "", target="cpu", places=True)
        assert [each.action for each in devguard.strays()] == ["placed"]
        assert found == []

    @pytest.mark.parametrize("mode", ["observe", "warn", "error"])
    def test_every_mode_calls_it(self, mode: Any) -> None:
        found: list[Stray] = []
        with devguard.on_stray(found.append), devguard.guard("cpu", mode=mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                stray()
            except devguard.StrayDeviceError:
                assert mode == "error"
        assert [each.action for each in found] == [{"observe": "observed", "warn": "warned", "error": "refused"}[mode]]

    def test_a_removed_callback_is_called_no_more(self) -> None:
        found: list[Stray] = []
        first, second = devguard.on_stray(found.append), devguard.on_stray(found.append)
        with devguard.guard("cpu"):
            stray("load")
            first.remove()
            first.remove()
            stray("jit")
            second.remove()
            stray("ipc")
        assert [each.door for each in found] == ["load", "load", "jit"]

    def test_the_repr_names_the_function(self) -> None:
        with devguard.on_stray(print) as registration:
            assert repr(registration) == "devguard.on_stray(print)"

    def test_what_cannot_be_called_is_refused(self) -> None:
        async def report(stray: Stray) -> None: ...

        with pytest.raises(devguard.ConfigError, match=r"a function with one parameter, the stray; got 'x'\."):
            devguard.on_stray("x")  # type: ignore[arg-type]
        with pytest.raises(devguard.ConfigError, match=r"cannot await .*report, a coroutine function.*call_soon"):
            devguard.on_stray(report)

    def test_an_error_is_reported_once_and_the_program_and_the_other_callbacks_go_on(self) -> None:
        found: list[Stray] = []

        def fail(stray: Stray) -> None:
            raise LookupError("no project")

        with devguard.on_stray(fail), devguard.on_stray(found.append), devguard.guard("cpu"):
            with pytest.warns(RuntimeWarning, match=r"callback .*fail of on_stray\(\) failed: LookupError: no project"):
                assert stray("load")
            assert stray("jit")
        assert [each.door for each in found] == ["load", "jit"]

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_a_request_to_end_passes_and_later_strays_are_announced(self, kind: type[BaseException]) -> None:
        def stop(stray: Stray) -> None:
            raise kind

        found: list[Stray] = []
        with devguard.guard("cpu"):
            with devguard.on_stray(stop), pytest.raises(kind):
                stray("load")
            with devguard.on_stray(found.append):
                stray("jit")
        assert [each.door for each in found] == ["jit"]

    def test_a_stray_of_a_callback_is_announced_after_it(self) -> None:
        heard: list[str] = []

        def report(found: Stray) -> None:
            heard.append(f"start {found.door}")
            stray("jit")
            heard.append(f"end {found.door}")

        with devguard.on_stray(report), devguard.guard("cpu"):
            stray("load")
        assert heard == ["start load", "end load", "start jit", "end jit"]

    def test_a_callback_that_strays_elsewhere_each_time_comes_to_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal, "_max_rows", 30)
        heard: list[Stray] = []

        def report(found: Stray) -> None:
            heard.append(found)
            stray(f"door {len(heard)}")

        with devguard.on_stray(report), devguard.guard("cpu"):
            stray("load")
        assert len(heard) == 30

    def test_a_callback_may_log_what_strays(self, logger: logging.Logger) -> None:
        class Straying(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                stray("jit")
                heard.append(record.getMessage())

        heard: list[str] = []
        logger.addHandler(Straying())
        found: list[Stray] = []

        def report(one: Stray) -> None:
            found.append(one)
            logger.error("called for %s", one.door)

        with devguard.on_stray(report):
            devguard.install("repair", "cpu")
            finish(lambda: stray("load"))
            wait_for(lambda: [each.door for each in found] == ["load", "jit"])
            wait_for(lambda: len(heard) == 4)  # two strays, and two records of the callback

    def test_without_a_callback_and_a_handler_no_record_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise AssertionError

        monkeypatch.setattr("devguard.reporting.announcements.format_row", fail)
        monkeypatch.setattr("devguard.reporting.announcements.LEVELS", dict.fromkeys(LEVELS, logging.DEBUG))
        with devguard.guard("cpu"):
            assert stray()

    def test_each_of_many_threads_announces_its_call_sites_once(self) -> None:
        found: list[Stray] = []
        doors = [f"door {number}" for number in range(40)]

        def work() -> None:
            with devguard.guard("cpu"):
                for door in doors:
                    stray(door)

        with devguard.on_stray(found.append):
            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(each.door for each in found) == sorted(doors)

    def test_a_forked_child_calls_it_for_its_own_strays(self) -> None:
        receiver, sender = os.pipe()
        with (
            devguard.on_stray(lambda one: os.write(sender, f"{os.getpid()} {one.pid};".encode())),
            devguard.guard("cpu"),
        ):
            stray()
            pid = os.fork()
            if not pid:
                with devguard.guard("cpu"):
                    stray(), stray()
                os._exit(0)
            os.waitpid(pid, 0)
        os.close(sender)
        assert os.read(receiver, 1000) == f"{os.getpid()} {os.getpid()};{pid} {pid};".encode()
        os.close(receiver)

    def test_a_child_that_is_forked_by_a_callback_announces_its_strays(self) -> None:
        receiver, sender = os.pipe()
        children: list[int] = []

        def report(one: Stray) -> None:
            os.write(sender, f"{one.door};".encode())
            if one.door == "load":
                children.append(os.fork())

        with devguard.on_stray(report), devguard.guard("cpu"):
            stray("load")
            if children == [0]:
                with devguard.guard("cpu"):
                    stray("jit")
                os._exit(0)
        os.waitpid(children[0], 0)
        os.close(sender)
        assert os.read(receiver, 1000) == b"load;jit;"
        os.close(receiver)

    def test_a_child_that_never_returns_to_the_callback_announces_its_strays(self) -> None:
        receiver, sender = os.pipe()

        def report(one: Stray) -> None:
            os.write(sender, f"{one.door};".encode())
            if one.door == "load":
                stray("threads")  # waits for its turn, which is the parent's
                pid = os.fork()
                if not pid:
                    with devguard.guard("cpu"):
                        stray("jit")
                    os._exit(0)
                os.waitpid(pid, 0)

        with devguard.on_stray(report), devguard.guard("cpu"):
            stray("load")
        os.close(sender)
        assert os.read(receiver, 1000) == b"load;jit;threads;"
        os.close(receiver)


class TestLocks:
    def test_the_journal_is_not_locked_during_a_callback(self) -> None:
        counts: list[int] = []

        def report(one: Stray) -> None:
            finish(lambda: counts.append(len(devguard.strays())))

        with devguard.on_stray(report), devguard.guard("cpu"):
            stray()
        assert counts == [1]

    def test_a_stray_of_a_finalizer_under_the_journals_lock_is_announced_without_it(self) -> None:
        counts: list[tuple[str, int]] = []
        with devguard.on_stray(lambda one: counts.append((one.door, len(devguard.strays())))), devguard.guard("cpu"):
            with journal._lock:
                stray()
                assert counts == []
            wait_for(lambda: counts == [("load", 1)])

    def test_a_stray_inside_a_handler_with_a_lock_of_its_own_does_not_deadlock(self, logger: logging.Logger) -> None:
        class Locked(logging.Handler):
            lock_of_its_own = threading.Lock()

            def handle(self, record: logging.LogRecord) -> bool:
                with self.lock_of_its_own:
                    devguard.guard("cpu").bind(stray)()
                    heard.append(record.getMessage())
                return True

        heard: list[str] = []
        logger.addHandler(Locked())
        finish(lambda: logger.error("a record"))
        wait_for(lambda: len(heard) == 2)
        assert heard[0] == "a record"
        assert "load: cuda:3 -> cpu" in heard[1]

    def test_a_stray_of_a_finalizer_inside_a_queue_of_records_does_not_deadlock(self, logger: logging.Logger) -> None:
        class Straying:
            def __del__(self) -> None:
                devguard.guard("cpu").bind(stray)()

        class Interrupted(queue.Queue[Any]):
            garbage: Any = None

            def _put(self, item: Any) -> None:
                Interrupted.garbage = None  # The finalizer runs here, while the queue is locked.
                super()._put(item)

        records: queue.Queue[Any] = Interrupted()
        logger.addHandler(logging.handlers.QueueHandler(records))
        Interrupted.garbage = Straying()
        finish(lambda: logger.error("a record"))
        messages = [records.get(timeout=WAIT_S).getMessage() for _ in range(2)]
        assert messages[0] == "a record"
        assert "load: cuda:3 -> cpu" in messages[1]

    def test_a_stray_of_a_finalizer_waits_for_no_lock_of_the_code_that_it_interrupts(self) -> None:
        lock = threading.Lock()
        found: list[str] = []

        class Straying:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                devguard.guard("cpu").bind(stray)()

        def report(one: Stray) -> None:
            with lock:
                found.append(one.door)

        def work() -> None:
            with lock:
                Straying()
                gc.collect()

        with devguard.on_stray(report):
            finish(work)
            wait_for(lambda: found == ["load"])

    def test_a_handler_that_waits_for_another_thread_that_strays_does_not_deadlock(
        self, logger: logging.Logger
    ) -> None:
        class Waiting(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage() == "a record":
                    thread = threading.Thread(target=devguard.guard("cpu").bind(devguard.strays), daemon=True)
                    thread.start()
                    thread.join(WAIT_S)
                    heard.append(thread.is_alive())

        heard: list[bool] = []
        logger.addHandler(Waiting())
        finish(lambda: logger.error("a record"))
        assert heard == [False]
