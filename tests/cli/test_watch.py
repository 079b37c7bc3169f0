"""``devguard watch`` as a command; tests/placement/cli/test_watch.py watches real programs on simulated GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from devguard import ConfigError, cli
from devguard.cli import watch
from devguard.reporting import sampler
from devguard.simgpu import records
from devguard.support import process_identity
from devguard.watch.cells import Cell
from devguard.watch.gpus import Simulation
from devguard.watch.matrix import Matrix, Row
from tests.helpers.scrapes import scrape
from tests.helpers.simulated import ROOT
from tests.watch.test_view import GPUS, Writer, use, writer

__all__ = ["writer"]  # the fixture

STRAYED = {"uuid": "GPU-a", "pids": {os.getpid(): 900 << 20}}
OWN = {"uuid": "GPU-b", "pids": {os.getpid(): 300 << 20}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_SAMPLES_S", 0.0)
    monkeypatch.setenv("COLUMNS", "120")


def test_once_prints_a_table_and_exits_with_3_on_a_stray(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, STRAYED, OWN)
    assert cli.main(["watch", "--once", str(writer.path.parent)]) == 3
    out = capsys.readouterr().out
    assert "STRAY 900.0 MiB" in out
    assert "\x1b" not in out
    use(monkeypatch, {"uuid": "GPU-a"}, OWN)
    assert cli.main(["watch", "--once", str(writer.path.parent)]) == 0
    assert "own 300.0 MiB" in capsys.readouterr().out


def test_once_as_json_is_the_matrix(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, STRAYED, OWN)
    assert cli.main(["watch", "--once", "--json", str(writer.path.parent)]) == 3
    found = json.loads(capsys.readouterr().out)
    (process,) = found["processes"]
    assert process["cells"]["a"] == {"verdict": "STRAY", "bytes": 900 << 20, "whole": True}
    assert [gpu["label"] for gpu in found["gpus"]] == ["0", "1"]


def test_once_waits_for_what_the_processes_report(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(watch, "FIRST_SAMPLES_S", 20.0)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            writer.sample(1e10, 5 << 20)

    monkeypatch.setattr("devguard.cli.watch.time.sleep", sleep)
    assert cli.main(["watch", "--once", str(writer.path.parent)]) == 0
    assert "own 5.0 MiB" in capsys.readouterr().out
    assert len(looks) == 3


def test_a_process_leads_to_its_log_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True); input()"],
        env={"DEVGUARD_LOG": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    try:
        use(monkeypatch, {"uuid": "GPU-a", "pids": {child.pid: 5 << 20, 1: 5}})
        assert cli.main(["watch", "--once", "--pid", str(child.pid)]) == 0
        assert (tmp_path / sampler.WATCHED).exists()
        out = capsys.readouterr().out
        assert f"{child.pid}" in out
        assert "foreign" not in out  # process 1 is not shown
    finally:
        child.communicate(b"\n")


def test_a_relative_log_folder_counts_from_the_working_directory_of_the_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True); input()"],
        env={"DEVGUARD_LOG": "logs"},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(ConfigError, match=r"its DEVGUARD_LOG is 'logs'.*Name the folder"):
            watch._find_folder(child.pid)
        (tmp_path / "logs").mkdir()
        assert watch._find_folder(child.pid) == tmp_path / "logs"
        child.communicate(b"\n", timeout=60)


def test_the_table_can_be_saved_as_a_picture(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, STRAYED, OWN)
    picture = tmp_path / "watch.svg"
    assert cli.main(["watch", "--once", "--svg", str(picture), str(writer.path.parent)]) == 3
    assert "STRAY" in capsys.readouterr().out
    words = "".join(ElementTree.parse(picture).getroot().itertext()).replace("\xa0", " ")
    assert "STRAY 900.0 MiB" in words
    assert cli.main(["watch", "--once", "--svg", str(tmp_path / "no" / "x.svg"), str(writer.path.parent)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_rich_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich", None)
    ran = tmp_path / "ran"
    assert cli.main(["watch", "--once", "--svg", "x.svg", "--", "touch", str(ran)]) == 2
    assert "--svg needs rich" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["watch", "--", "touch", str(ran)]) == 2
    assert "the live screen needs rich" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", "0.1"], r"0\.1 is too short.*lock of the driver.*0\.5 or more"),
        (["--interval", "nan"], r"too short"),
        (["--interval", "inf"], r"too long"),
        (["--mode", "observe"], r"--mode is only valid with a program"),
        (["--mode", "fix", "--", "true"], r"'fix' is not a mode"),
        (["--svg", "x.svg"], r"--svg is only valid with --once"),
        (["--json"], r"--json is only valid with --once"),
        (["--serve", "0", "--once"], r"--serve is not valid with --once"),
        (["--label-pid"], r"--label-pid is only valid with --serve"),
        (["--pid", "1", "--", "true"], r"--pid is not valid with a program"),
        (["--serve", "host"], r"--serve 'host': valid is a port"),
        (["--serve", "0", "/no/such/folder"], r"is not a folder"),
        (["--once", "--pid", "999999999"], r"--pid 999999999: No such"),
        (["--once", "/no/such/folder"], r"is not a folder"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    use(monkeypatch)
    assert cli.main(["watch", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_explains_each_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["watch", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for verdict, meaning in watch.VERDICTS.items():
        assert f"  {verdict:8} {meaning}\n" in out


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, "-m", "devguard", "watch", *words]
    return subprocess.run(
        command,
        env={**environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_with_a_program_the_output_is_the_programs_and_then_the_table() -> None:
    done = run("--once", "--", "sh", "-c", "echo said; exit 7")
    assert done.returncode == 7
    assert done.stdout.splitlines()[0] == "said"
    assert "no process is on a GPU" in done.stdout


def test_the_log_of_a_program_stays_where_a_folder_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    done = run("--once", str(folder), "--", sys.executable, "-c", "import torch")
    assert done.returncode == 0, done.stderr
    assert (folder / sampler.RECORDED).exists()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("*.jsonl"))) == 1


QUICK = """
import json, os, sys, time
lines = [
    {"process": {"pid": 7, "host": "here", "command": "python quick.py", "time": time.time()}},
    {"state": STATE, "time": time.time()},
    {"now": {"memory": {"cuda:1": [1, 1, 1], "cuda:0": [9, 9, 9]}, "strays": 0}, "time": time.time()},
    {"end": {**STATE, "time": time.time()}},
]
with open(os.path.join(os.environ["DEVGUARD_LOG"], "7.jsonl"), "w") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines)
"""


def test_once_sees_a_process_that_lived_between_two_looks(tmp_path: Path) -> None:
    state = {"process_owner": "cuda:1", "owned": ["cuda:1"], "contexts": ["cuda:0", "cuda:1"]}
    code = f"STATE = {state}\n{QUICK}"
    folder = tmp_path / "logs"
    done = run("--once", "--interval", "600", str(folder), "--", sys.executable, "-c", code)
    assert done.returncode == 3, done.stderr
    assert "STRAY 9 B" in done.stdout
    done = run("--once", str(folder), "--", "true")  # that one has not begun now
    assert done.returncode == 0, done.stdout


def test_the_worst_moment_is_not_that_in_which_a_process_has_closed_its_log_already() -> None:
    def seen(owner: str | None, verdict: Any) -> Matrix:
        cells = {uuid: Cell(verdict, 1, True) for uuid in "ab"}
        return Matrix(1.0, (), (Row(7, "train.py", owner, None, owner is not None, True, cells),))

    looks = [seen("cuda:0", "own"), seen(None, "?"), Matrix(2.0, (), ()), seen("cuda:0", "own")]
    running = iter([True, True, False])
    started: Any = Namespace(begun=0.0, is_running=lambda: next(running), pause=lambda seconds: None)
    view: Any = Namespace(look=lambda ended_since=None: looks.pop(0))
    assert watch._worst(view, started, 1.0).rows[0].owner == "cuda:0"
    assert looks == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    place, told = tmp_path / "tmp", tmp_path / "pid"
    place.mkdir()
    environ = {**os.environ, "DEVGUARD": "off", "TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    code = f"import os, time; open({str(told)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(600)"
    words = [sys.executable, "-m", "devguard", "watch", "--", sys.executable, "-c", code]
    watcher = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 60
    while not (told.exists() and told.read_text().endswith(".")):
        assert time.monotonic() < end
        time.sleep(0.01)
    watcher.send_signal(number)
    watcher.communicate(timeout=60)
    assert watcher.returncode == -number
    assert not process_identity.started(int(told.read_text()[:-1]))
    assert not list(place.iterdir())


def test_a_terminal_that_shows_no_screen_gets_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Namespace(isatty=lambda: True))
    for name, is_live in (("xterm", True), ("dumb", False), ("", True)):
        monkeypatch.setenv("TERM", name)
        assert watch._is_live(Namespace(once=False)) is is_live


def test_a_folder_without_logs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch)
    assert cli.main(["watch", "--once", str(tmp_path)]) == 2
    assert "holds no log" in capsys.readouterr().err


def test_the_mode_is_that_of_the_program() -> None:
    code = "import os, torch; print('mode', os.environ['DEVGUARD'])"
    done = run("--once", "--mode", "observe", "--", sys.executable, "-c", code)
    assert "mode observe\n" in done.stdout, done.stderr


def test_a_program_that_is_not_there_is_an_error() -> None:
    done = run("--once", "--", "no-such-program")
    assert done.returncode == 127
    assert "no program 'no-such-program'" in done.stderr


def test_without_a_terminal_the_table_is_printed_when_it_changes() -> None:
    done = run("--interval", "0.5", "--", "sh", "-c", "sleep 1.2")
    assert done.returncode == 0
    assert done.stdout.count("no process is on a GPU") == 1


def test_the_driver_is_not_asked_for_a_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    records.create(tmp_path / "state", memory=1 << 30, context_bytes=0)
    Writer(tmp_path, 1, DEVGUARD_SIM_STATE=str(tmp_path / "state")).line({"state": GPUS, "time": 1.0})
    read: list[Any] = []
    monkeypatch.setattr(Simulation, "read", lambda self: read.append(self) or [])
    assert cli.main(["watch", "--once", str(tmp_path)]) == 0
    assert read


def test_serve_answers_scrapes_says_what_it_cannot_read_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    records.create(tmp_path / "state", memory=1 << 30, context_bytes=0)
    log = tmp_path / "log"
    log.mkdir()
    Writer(log, 1, DEVGUARD_SIM_STATE=str(tmp_path / "state")).row(0, 3)
    with subprocess.Popen(
        [sys.executable, "-m", "devguard", "watch", log, "--serve", "0", "--interval", "0.5"],
        env={**environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stderr is not None
        try:
            url = watcher.stderr.readline().split()[-1]
            found = scrape(url)
            assert [*found["devguard_strays_total"].values()] == [3]
            assert found["devguard_scrape_success"] == {(): 1}
            (tmp_path / "state").unlink()
            while scrape(url)["devguard_scrape_success"] == {(): 1}:
                time.sleep(0.05)
            assert "devguard watch: cannot be read: " in (line := watcher.stderr.readline())
            assert "its simulated GPUs" in line
            watcher.send_signal(signal.SIGINT)
            out, err = watcher.communicate(timeout=60)
        finally:
            watcher.kill()
    assert (watcher.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_serve_ends_with_the_program(tmp_path: Path) -> None:
    done = run("--serve", "0", str(tmp_path), "--", "sh", "-c", "exit 7")
    assert done.returncode == 7
    assert "metrics at http://127.0.0.1:" in done.stderr
