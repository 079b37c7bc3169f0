"""The ends of children, as the parent that collects them sees them."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.popen_fork
import multiprocessing.popen_forkserver
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from devguard.reporting import child_ends

Told = list[tuple[int, int]]


@pytest.fixture
def told() -> Iterator[Told]:
    """What is told of children, while they are watched."""
    found: Told = []
    child_ends.watch(lambda pid, code: found.append((pid, code)))
    yield found
    assert child_ends.unwatch() == []


def start(code: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code], **options)


def die(how: int) -> None:
    if how < 0:
        os.kill(os.getpid(), -how)
    os._exit(how)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_of_multiprocessing_that_fails_is_told_once(method: str, told: Told) -> None:
    context: Any = multiprocessing.get_context(method)
    expected = []
    for how in (-signal.SIGKILL, 3, 0):
        child = context.Process(target=die, args=(how,))
        child.start()
        child.join()
        assert child.exitcode == how
        expected += [(child.pid, how)] if how else []
    assert told == expected


def test_a_child_of_subprocess_that_fails_is_told_once(told: Told) -> None:
    killed = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.wait() == killed.poll() == -signal.SIGKILL
    failed = subprocess.Popen(["false"])
    while failed.poll() is None:
        pass
    subprocess.run(["true"], check=True)
    assert told == [(killed.pid, -signal.SIGKILL), (failed.pid, 1)]


def test_a_child_that_the_garbage_collection_collects_is_told(told: Told) -> None:
    child = start("raise SystemExit(4)")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    pid = child.pid
    with pytest.warns(ResourceWarning, match="still running"):
        del child
    assert told == [(pid, 4)]


def test_a_stopped_child_has_not_ended(told: Told) -> None:
    child = start("input()", stdin=subprocess.PIPE)
    stopped = ctypes.c_int(signal.SIGSTOP << 8 | 0x7F).value
    child._handle_exitstatus(stopped)  # type: ignore[attr-defined]
    assert child.returncode == -signal.SIGSTOP
    child.returncode = None
    child.communicate(b"\n")
    assert told == []


def test_a_note_that_fails_does_not_keep_the_program_from_its_child() -> None:
    def fail(pid: int, code: int) -> None:
        raise OSError(28, "No space left on device")

    child_ends.watch(fail)
    assert subprocess.run(["false"], check=False).returncode == 1
    child_ends.unwatch()


def test_the_functions_are_put_back_and_a_foreign_patch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    popens = (multiprocessing.popen_fork.Popen, multiprocessing.popen_forkserver.Popen)
    before = [subprocess.Popen._handle_exitstatus, *(popen.poll for popen in popens)]  # type: ignore[attr-defined]
    child_ends.watch(lambda pid, code: None)
    child_ends.watch(lambda pid, code: None)
    watched = [subprocess.Popen._handle_exitstatus, *(popen.poll for popen in popens)]  # type: ignore[attr-defined]
    assert not set(before) & set(watched)
    assert child_ends.unwatch() == []
    assert [subprocess.Popen._handle_exitstatus, *(popen.poll for popen in popens)] == before  # type: ignore[attr-defined]
    child_ends.watch(lambda pid, code: None)
    with monkeypatch.context() as patch:
        patch.setattr(popens[1], "poll", lambda self, flag=os.WNOHANG: self.returncode)
        assert child_ends.unwatch() == ["Popen.poll"]
    assert [popen.poll.__wrapped__ for popen in popens[1:]] == [before[2]]  # type: ignore[attr-defined]
    popens[1].poll = before[2]  # type: ignore[method-assign]


def test_a_release_without_such_a_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(subprocess.Popen, "_handle_exitstatus")
    child_ends.watch(lambda pid, code: None)
    assert not hasattr(subprocess.Popen, "_handle_exitstatus")
    assert child_ends.unwatch() == []
