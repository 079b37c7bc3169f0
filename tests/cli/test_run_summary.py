"""``devguard run --summary``: what it prints, what it leaves alone, and that nothing of it stays."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from devguard import cli
from devguard.cli import program, run_summary
from devguard.cli.supervisor import End
from devguard.support.log_folder import TEMPORARY
from tests.helpers import tagging
from tests.helpers.simulated import ROOT
from tests.helpers.terminal_job import Terminal

# What a guarded program does when it has imported torch, and strays at its line 11; torch itself is not needed.
GUARDED = """
import os, signal, sys, time
from pathlib import Path
from devguard.doors import table
from devguard.reporting import log_file
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence
log_file.start(Path(os.environ["DEVGUARD_LOG"]), last_look=table.look)
def stray(action="repaired"):
    target = "cuda:1" if action == "repaired" else None
    journal.record(Occurrence("load", "cuda:0", "cuda:1", 8, sys._getframe(1)), action, target)
"""
NOTHING = (
    "devguard: nothing was recorded: no process of the program has imported torch, or none could write its log on this "
    "machine.\n"
)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which temporary folders are made in ``tmp_path / "tmp"``."""
    tmp_path.joinpath("tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    return {**kept, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}


def devguard_run(*words: str) -> list[str]:
    return [sys.executable, "-m", "devguard", "run", "--summary", *words]


def guarded(code: str) -> list[str]:
    """Return a program that runs `code`, in which ``stray(action)`` records a stray."""
    return ["sh", "-c", f"exec {shlex.join([sys.executable, '-c', GUARDED + code])}"]


def run(environ: dict[str, str], *words: str) -> tuple[int, str, str]:
    """Run ``devguard run --summary``; return its status and output. Nothing may stay in the temporary folder."""
    done = subprocess.run(devguard_run(*words), env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert os.listdir(environ["TMPDIR"]) == []
    return done.returncode, done.stdout, done.stderr


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_summary_is_the_text_of_devguard_log(
    environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "for _ in range(3): stray()\nstray('observed'); stray('kept'); print('output'); sys.exit(5)"
    status, out, err = run(environ, "--log", str(tmp_path / "logs"), *guarded(code))
    assert (status, out) == (5, "output\n")
    assert cli.main(["log", str(tmp_path / "logs")]) == 0
    assert err == f"devguard: {capsys.readouterr().out}"
    assert "3 x  load: cuda:0 -> cuda:1 [repaired]" in err


def test_without_a_folder_the_logs_are_private_and_temporary(environ: dict[str, str]) -> None:
    code = "stray(); folder = Path(os.environ['DEVGUARD_LOG']); print(folder, oct(folder.stat().st_mode & 0o777))"
    status, out, err = run(environ, *guarded(code))
    folder, mode = out.split()
    assert (status, mode, Path(folder).parent) == (0, "0o700", Path(environ["TMPDIR"]))
    assert err.startswith("devguard: 1 process(es), 1 stray(s) at 1 call site(s), 8 B\n")
    assert folder not in err


def test_a_program_that_strays_really(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(tagging.save(torch.arange(4.0)))
    (tmp_path / "program.py").write_text("import torch\nprint(torch.load('checkpoint.pt').device)\n")
    words = ["-C", str(tmp_path), *devguard_run("--device", "cpu", sys.executable, "program.py")]
    done = subprocess.run(
        ["env", *words], env={**environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "cpu\n")
    assert "16 B  1 x  load: cuda:3 -> cpu [repaired]" in done.stderr
    assert "program.py:2 in <module>" in done.stderr


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("", "nothing strayed in 1 process."),
        ("stray('placed'); stray('placed'); stray('kept')", "nothing strayed in 1 process (2 placed, 1 kept)."),
        ("if os.fork(): os.wait()\njournal.log._write(None)", "nothing strayed in 2 processes."),
    ],
)
def test_a_run_in_which_nothing_strayed_is_one_line(environ: dict[str, str], code: str, line: str) -> None:
    assert run(environ, *guarded(code)) == (0, "", f"devguard: {line}\n")


def test_a_program_that_is_not_guarded_is_one_line(environ: dict[str, str], tmp_path: Path) -> None:
    assert run(environ, "sh", "-c", "exit 4") == (4, "", NOTHING)
    assert run(environ, "--log", str(tmp_path / "none"), "true") == (0, "", NOTHING)
    off = "devguard: the guard was off (mode off), so nothing was recorded.\n"
    assert run(environ, "--mode", "off", "sh", "-c", "exit 4") == (4, "", off)
    assert run({**environ, "DEVGUARD": "off"}, *guarded("print(os.environ['DEVGUARD'])")) == (0, "off\n", off)


def test_a_killed_program_has_the_status_of_a_shell_and_its_end_is_named(environ: dict[str, str]) -> None:
    status, _, err = run(environ, *guarded("stray(); os.kill(os.getpid(), signal.SIGKILL)"))
    assert status == 137
    assert "1 x  load: cuda:0 -> cuda:1 [repaired]" in err
    assert "killed by SIGKILL" in err
    status, _, err = run(environ, *guarded("os.kill(os.getpid(), signal.SIGTERM)"))
    assert status == 143
    assert err.startswith("devguard: nothing strayed in 1 process.\n\npid ")
    assert "killed by SIGTERM" in err
    status, _, err = run(environ, *guarded("stray(); os.kill(os.getpid(), signal.SIGRTMIN + 1)"))
    assert status == 128 + signal.SIGRTMIN + 1
    assert f"killed by signal {signal.SIGRTMIN + 1}" in err


def test_earlier_logs_in_the_folder_are_left_out(environ: dict[str, str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    run(environ, "--log", str(logs), *guarded("stray()"))
    (logs / "damaged.jsonl").write_text("{")
    assert run(environ, "--log", str(logs), *guarded("")) == (0, "", "devguard: nothing strayed in 1 process.\n")
    assert run(environ, "--log", str(logs), "true") == (0, "", NOTHING)
    assert len(os.listdir(logs)) == 3


def test_a_program_that_cannot_be_started_leaves_nothing(environ: dict[str, str], tmp_path: Path) -> None:
    assert run(environ, "no-such-program") == (127, "", "devguard run: there is no program 'no-such-program' on PATH\n")
    text = tmp_path / "text"
    text.write_text("\x7fno program")
    text.chmod(0o700)
    status, out, err = run(environ, str(text))
    assert (status, out) == (126, "")
    assert err == f"devguard run: {text} cannot be run: Exec format error\n"


def test_ctrl_c_ends_the_program_and_leaves_nothing_behind(environ: dict[str, str]) -> None:
    code = "stray()\ntry: print('ready', flush=True), time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(9)"
    with Terminal(devguard_run(*guarded(code)), TMPDIR=environ["TMPDIR"]) as terminal:
        terminal.wait_for("ready")
        assert [name.startswith(TEMPORARY) for name in os.listdir(environ["TMPDIR"])] == [True]
        terminal.type(b"\x03")
        assert "devguard: 1 process(es), 1 stray(s)" in terminal.wait_for("[ended 9]")
    assert os.listdir(environ["TMPDIR"]) == []


def test_a_process_that_lives_on_is_not_waited_for_and_does_not_bring_the_folder_back(
    environ: dict[str, str], tmp_path: Path
) -> None:
    code = f"""
stray()
if os.fork() == 0:
    os.dup2(os.open("{tmp_path}/daemon", os.O_WRONLY | os.O_CREAT), 1), os.dup2(1, 2)
    stray()
    Path("{tmp_path}/started").touch()
    while not Path("{tmp_path}/go").exists(): time.sleep(0.01)
    if os.fork() == 0:
        stray()
        print("survived", flush=True)
    os._exit(0)
while not Path("{tmp_path}/started").exists(): time.sleep(0.01)
"""
    status, _, err = run(environ, *guarded(code))
    (tmp_path / "go").touch()
    assert status == 0
    assert "2 process(es), 2 stray(s)" in err
    assert err.endswith("Still running: 1 of 2 processes. devguard run --log DIR keeps their logs.\n")
    wait_for(lambda: "survived" in (tmp_path / "daemon").read_text())
    assert "devguard cannot write its log" in (tmp_path / "daemon").read_text()
    assert os.listdir(environ["TMPDIR"]) == []


def test_a_closed_standard_output_does_not_change_the_status(environ: dict[str, str]) -> None:
    script = f"exec {shlex.join(devguard_run('sh', '-c', 'exit 6'))} >&-"
    done = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, NOTHING)


def test_a_pipe_carries_only_what_the_program_writes(environ: dict[str, str]) -> None:
    script = f"printf 'a\\nb\\n' | {shlex.join(devguard_run('cat'))} | head -1"
    done = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("a\n", NOTHING)


def test_a_summary_that_fails_does_not_change_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*args: object) -> None:
        raise LookupError("no log")

    monkeypatch.setattr("devguard.logs.reader.read", fail)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    environ = {"DEVGUARD": "repair", "DEVGUARD_LOG": str(tmp_path)}
    assert run_summary.run("/bin/sh", ["sh", "-c", "exit 3"], environ) == 3
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert capsys.readouterr() == ("", "devguard: there is no summary: LookupError: no log\n")


def test_an_interrupt_during_the_summary_comes_after_the_folder_is_removed(environ: dict[str, str]) -> None:
    code = """
import os, signal, sys
from devguard.cli import run_summary
from devguard.logs import reader as log_reader
def interrupt(folder, is_selected):
    os.kill(os.getpid(), signal.SIGINT)
    print(os.path.isdir(folder))
log_reader.read = interrupt
try:
    run_summary.run("/bin/true", ["true"], {"DEVGUARD": "repair"})
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\ninterrupted\n")
    assert os.listdir(environ["TMPDIR"]) == []


def test_the_status_of_a_signal_is_that_of_a_shell() -> None:
    assert [End(1, code).status for code in (0, 7, -9)] == [0, 7, 137]


def test_the_options_reach_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[list[str], dict[str, str]]] = []

    def record(path: str, words: list[str], environment: dict[str, str]) -> int:
        got.append((words, {name: value for name, value in environment.items() if name.startswith("DEVGUARD")}))
        return 0

    monkeypatch.setattr(run_summary, "run", record)
    monkeypatch.setattr(program, "become", None)
    for name in [name for name in os.environ if name.startswith("DEVGUARD") or "RANK" in name]:
        monkeypatch.delenv(name)
    assert cli.main(["run", "--summary", "--mode", "warn", "true", "--summary"]) == 0
    assert got == [(["true", "--summary"], {"DEVGUARD": "warn"})]
