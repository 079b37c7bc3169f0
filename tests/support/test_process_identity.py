"""Which process a pid means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from devguard.support import process_identity
from tests.helpers.fakeproc import NEVER, FakeProc


def test_a_process_is_running_until_it_ends_also_before_it_is_collected() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    since = process_identity.started(child.pid)
    assert process_identity.is_running(child.pid, since)
    assert not process_identity.is_running(child.pid, since + 1)  # another process with this pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process_identity.is_running(child.pid, since)
    child.communicate()
    assert process_identity.started(child.pid) == 0


def test_a_start_that_is_unknown_is_no_running_process() -> None:
    assert process_identity.started(NEVER) == 0
    assert not process_identity.is_running(NEVER, 0)
    assert not process_identity.is_running(os.getpid(), 0)


def test_a_pid_space_is_one_pid_namespace_of_one_start_of_the_machine(tmp_path: Path) -> None:
    assert process_identity.pid_space(FakeProc(tmp_path / "silent").path) == ""
    proc = FakeProc(tmp_path / "proc")
    (proc.path / "sys/kernel/random").mkdir(parents=True)
    (proc.path / "sys/kernel/random/boot_id").write_text("b007-1d\n")
    assert process_identity.pid_space(proc.path) == "b007-1d pid:[1]"
    assert process_identity.pid_space() == process_identity.pid_space() != ""
