"""The parent of a program: exit statuses, signals, the terminal, streams, and what it does not wait for."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard.cli import supervisor
from devguard.support import process_stat
from tests.helpers.simulated import ROOT
from tests.helpers.terminal_job import Terminal

PARENT = """
import os, shutil, sys
from devguard.cli import supervisor
with supervisor.signals_held() as before:
    status = supervisor.run(shutil.which(sys.argv[1]), sys.argv[1:], os.environ, before).status
sys.exit(status)
"""
# Prints the signals that it gets, until SIGRTMAX ends it: the one that is delivered after all others.
LISTENER = """
import os, signal, sys
listened = [signal.Signals[name] for name in sys.argv[1:]] + [signal.SIGRTMAX]
signal.pthread_sigmask(signal.SIG_BLOCK, listened)
print("ready", os.getpid(), flush=True)
for received in iter(lambda: signal.sigwait(listened), signal.SIGRTMAX):
    print(received.name, flush=True)
"""


def command(*program: str) -> list[str]:
    """Return the command that runs a program under a parent."""
    return [sys.executable, "-c", PARENT, *program]


def start(*program: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*program), cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


def run(*program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*program), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options
    )


def parent_of(pid: int) -> int:
    return int(process_stat.read_fields(Path(f"/proc/{pid}"))[1])


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("true", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -2 $$", 130),
    ],
)
def test_the_exit_status_is_that_of_a_shell(ending: str, status: int) -> None:
    done = run("sh", "-c", ending)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGWINCH", "SIGTSTP", "SIGCONT", "SIGALRM"]
)
def test_a_signal_to_the_parent_reaches_the_program(name: str) -> None:
    with start(sys.executable, "-c", LISTENER, name) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("ready")
        parent.send_signal(signal.Signals[name])
        parent.send_signal(signal.SIGRTMAX)
        assert parent.stdout.read() == f"{name}\n"
    assert parent.returncode == 0


def test_a_program_that_a_signal_ends_gives_its_number() -> None:
    with start("sh", "-c", "echo ready; exec sleep 60") as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.send_signal(signal.SIGTERM)
        parent.wait(60)
    assert parent.returncode == 143


def test_ctrl_c_at_the_terminal_reaches_the_program() -> None:
    with Terminal(command(sys.executable, "-c", LISTENER, "SIGINT", "SIGQUIT")) as terminal:
        terminal.wait_for("ready ")
        program = int(terminal.wait_for("\n"))
        for keys, name in ((b"\x03", "SIGINT"), (b"\x1c", "SIGQUIT")):
            terminal.type(keys)  # which also discards what the terminal has not shown yet
            terminal.wait_for(name)
        os.kill(parent_of(program), signal.SIGRTMAX)
        terminal.wait_for("[ended 0]")


def test_what_is_typed_is_not_passed_on_as_well() -> None:
    own_group = "import os; os.setpgid(0, 0)\n" + LISTENER  # so that it gets what is passed on only
    with Terminal(command(sys.executable, "-c", own_group, "SIGINT", "SIGQUIT")) as terminal:
        terminal.wait_for("ready ")
        program = int(terminal.wait_for("\n"))
        terminal.type(b"\x03\x1c")
        terminal.wait_for("^\\")
        os.kill(parent_of(program), signal.SIGRTMAX)
        assert terminal.wait_for("[ended 0]").split() == []


def test_ctrl_c_that_ends_the_program_does_not_end_the_parent_first() -> None:
    with Terminal(
        command("sh", "-c", "trap 'echo cleaned; exit 9' INT; echo ready; while :; do sleep 0.05; done")
    ) as t:
        t.wait_for("ready")
        t.type(b"\x03")
        assert "cleaned" in t.wait_for("[ended 9]")


def test_a_job_that_ctrl_z_stops_goes_on_in_the_foreground() -> None:
    program = "import signal; print('ready', flush=True); print(f'<{input()}>', flush=True)"
    with Terminal(command(sys.executable, "-c", program)) as terminal:
        terminal.wait_for("ready")
        terminal.type(b"\x1a")
        terminal.wait_for("[stopped 19]")  # and continued
        terminal.type(b"typed\n")
        terminal.wait_for("<typed>")
        terminal.wait_for("[ended 0]")


def test_a_program_that_ignores_ctrl_z_is_not_stopped() -> None:
    with Terminal(command(sys.executable, "-c", LISTENER, "SIGTSTP")) as terminal:
        terminal.wait_for("ready ")
        program = int(terminal.wait_for("\n"))
        terminal.type(b"\x1a")
        terminal.wait_for("^Z")
        os.kill(program, signal.SIGRTMAX)
        assert terminal.wait_for("[ended 0]").split() == ["SIGTSTP"]


def test_the_streams_are_those_of_the_program() -> None:
    done = subprocess.run(command("cat"), cwd=ROOT, input=b"\0\xff\r\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\0\xff\r\n", b"")


def test_the_program_inherits_descriptors_and_a_closed_stream() -> None:
    receiver, sender = os.pipe()
    assert run(sys.executable, "-c", f"import os; os.write({sender}, b'there')", pass_fds=[sender]).returncode == 0
    os.close(sender)
    assert os.read(receiver, 100) == b"there"
    os.close(receiver)
    script = f"exec {shlex.join(command('sh', '-c', 'echo there'))} >&-"
    assert subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, check=False).returncode != 0


def test_a_pipe_that_nothing_reads_ends_the_program_as_it_would_without_a_parent() -> None:
    done = run("sh", "-c", "yes | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "y\n", "")


def test_a_process_that_outlives_the_program_is_not_waited_for() -> None:
    done = run("sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!")
    os.kill(int(done.stdout), signal.SIGKILL)  # it was still there
    assert done.returncode == 0


@pytest.mark.parametrize("held", [set(), {signal.SIGUSR1}])
def test_the_program_starts_with_the_signals_of_the_caller(held: set[signal.Signals]) -> None:
    code = "import signal; print(*(each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        done = run(sys.executable, "-c", code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert done.stdout.split() == [each.name for each in held]


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    script = f"trap '' HUP; exec {shlex.join(command('sh', '-c', 'kill -HUP $$; echo on'))}"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_a_program_that_cannot_be_started_is_an_error_and_the_signals_are_as_before(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with supervisor.signals_held() as held, pytest.raises(OSError, match="No such file"):
        supervisor.run(str(tmp_path / "none"), ["none"], {}, held)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_signals_that_come_after_the_program_has_ended_act_at_the_end_of_the_block() -> None:
    code = """
import os, signal
from devguard.cli import supervisor
signal.signal(signal.SIGUSR1, lambda number, frame: print("got it"))
with supervisor.signals_held() as held:
    supervisor.run("/bin/true", ["true"], {}, held)
    os.kill(os.getpid(), signal.SIGUSR1)
    print("held")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "held\ngot it\n"


def test_the_end_is_seen_although_another_thread_takes_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    monkeypatch.setattr(supervisor.signal, "SIGCHLD", signal.SIGUSR1)
    with supervisor.signals_held() as held:
        assert supervisor.run("/bin/sh", ["sh", "-c", "exit 4"], {}, held).code == 4
