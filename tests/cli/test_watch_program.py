"""The program beside the watcher: its status, its output, and its end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from devguard.cli.watch_program import start


@pytest.fixture(autouse=True)
def _unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)])
@pytest.mark.parametrize("is_captured", [False, True])
def test_the_status_is_that_of_a_shell(tmp_path: Path, end: str, status: int, is_captured: bool) -> None:
    with start(["sh", "-c", end], tmp_path, is_captured=is_captured) as program:
        assert program.wait() == status
    assert not program.is_running()


def test_captured_output_is_kept_and_copied_in_the_end(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with start(["sh", "-c", "echo out; echo err >&2; cat"], tmp_path, is_captured=True) as program:
        assert program.wait() == 0
        assert capfdbinary.readouterr().out == b""
        program.copy_output()
    assert capfdbinary.readouterr().out == b"out\nerr\n"


def test_a_program_that_still_runs_is_ended_with_the_block(tmp_path: Path) -> None:
    for is_captured in (False, True):
        with start(["sleep", "600"], tmp_path, is_captured=is_captured) as program:
            program.pause(0.01)
            assert program.is_running()
        assert not program.is_running()


def test_ctrl_c_of_the_watcher_leaves_the_program_time_for_its_own_end(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = (
        "import time\nprint('on', flush=True)\ntry: time.sleep(600)\n"
        f"except KeyboardInterrupt: time.sleep(0.2); open({str(done)!r}, 'w').close()"
    )
    with pytest.raises(KeyboardInterrupt), start([sys.executable, "-c", code], tmp_path, is_captured=True) as program:
        assert program.output is not None
        end = time.monotonic() + 60
        while b"on" not in program.output.read_bytes():
            assert time.monotonic() < end
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert done.exists()


def test_ctrl_c_is_passed_on_to_a_program_with_a_session_of_its_own(tmp_path: Path) -> None:
    code = "import time\nprint('on', flush=True)\ntry: time.sleep(600)\nexcept KeyboardInterrupt: raise SystemExit(5)"
    with start([sys.executable, "-c", code], tmp_path, is_captured=True) as program:
        assert program.output is not None
        assert os.getsid(program.pid) == program.pid
        end = time.monotonic() + 60
        while b"on" not in program.output.read_bytes():
            assert time.monotonic() < end
            time.sleep(0.01)
        program.interrupt()
        assert program.wait() == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
