"""``DEVGUARD_LOG`` with processes that are killed, fork, or write at the same time; and the reading of the logs.

The writers record strays directly and do not import torch, so that many can run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devguard import cli
from devguard.logs import reader as log_reader
from tests.helpers.simulated import ROOT

BEFORE = """
import os, signal, sys
import devguard
from pathlib import Path
from devguard.doors import table
from devguard.reporting import log_file
from devguard.reporting.journal import journal
from devguard.reporting.stray import Occurrence

def stray(nbytes=8):
    journal.record(Occurrence("load", "cuda:0", "cuda:1", nbytes, sys._getframe(1)), "repaired", "cuda:1")

log_file.start(Path(sys.argv[1]), last_look=table.look)
"""


def start(code: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start a process that logs to `folder` and runs `code`, where ``stray(nbytes)`` records a stray."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, *options, "-c", BEFORE + code, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code: str, folder: Path, *options: str, status: int = 0) -> tuple[str, str]:
    process = start(code, folder, *options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def log(capsys: pytest.CaptureFixture[str], folder: Path, status: int = 0) -> dict[str, Any]:
    assert cli.main(["log", str(folder), "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_log_of_a_killed_process_has_every_call_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
for _ in range(3):
    stray(1000)
stray(8)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(code, tmp_path, status=-9)
    found = log(capsys, tmp_path)
    assert [(site["bytes"] >= 1000, site["devices"]) for site in found["strays"]] == [
        (True, ["cuda:0 -> cuda:1"]),
        (False, ["cuda:0 -> cuda:1"]),
    ]
    assert [process["ended"] for process in found["processes"]] == [False]
    assert cli.main(["log", str(tmp_path), "--processes"]) == 0
    assert "killed or crashed (no last line)" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(-9 % 256)", "os.abort()"])
@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_the_log_of_a_killed_process_has_every_stray(
    count: int, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {"os.k": -9, "os._": 247, "os.a": -6}[end[:4]]
    run(f"for _ in range({count}): stray(8)\n{end}", tmp_path, status=status)
    found = log(capsys, tmp_path)
    assert [(site["count"], site["bytes"]) for site in found["strays"]] == [(count, 8 * count)]


def test_a_file_that_becomes_a_pipe_does_not_stop_the_program(tmp_path: Path) -> None:
    code = """
stray()
(path,) = [os.path.join(sys.argv[1], name) for name in os.listdir(sys.argv[1])]
os.closerange(3, 64)
os.unlink(path)
os.mkfifo(path)
signal.alarm(60)
for _ in range(3): stray()
print(journal.total)
"""
    out, err = run(code, tmp_path)
    assert out == "4\n"
    assert err.count("cannot write its log") == 1


def test_eight_processes_write_at_once_while_another_reads(tmp_path: Path) -> None:
    tmp_path.joinpath("first.jsonl").write_text('{"process": {"pid": 1, "host": "here", "command": "first"}}\n')
    code = "for number in range(500): stray(number % 7)\nfor number in range(500): stray(9); journal.log.flush()"
    writers = [start(code, tmp_path) for _ in range(8)]
    while any(writer.poll() is None for writer in writers):
        assert log_reader.read(tmp_path)[2] == []
    assert [writer.communicate()[1] for writer in writers] == [""] * 8
    processes, merged, damaged = log_reader.read(tmp_path)
    assert damaged == []
    assert [process.ended for process in processes if process.pid != 1] == [True] * 8
    assert [site.count for site in merged] == [4000, 4000]
    assert [site.bytes for site in merged] == [4000 * 9, 8 * sum(number % 7 for number in range(500))]
    assert sorted(merged[0].processes) == sorted(writer.pid for writer in writers)


def test_a_forked_child_starts_and_ends_its_own_file(tmp_path: Path) -> None:
    code = """
for _ in range(2): stray()
child = os.fork()
for _ in range(5 if child == 0 else 1): stray()
if child == 0: sys.exit()
os.waitpid(child, 0)
silent = os.fork()
if silent == 0: sys.exit()
os.waitpid(silent, 0)
"""
    run(code, tmp_path)
    processes, merged, damaged = log_reader.read(tmp_path)
    assert damaged == []
    assert [process.ended for process in processes] == [True] * len(processes)
    counts = sorted((site.count, len(site.processes)) for site in merged)
    assert counts == [(2, 1), (6, 2)]


def test_damaged_lines_are_named_and_all_others_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("stray(64)", tmp_path)
    (whole,) = tmp_path.glob("*.jsonl")
    lines = whole.read_text().splitlines()
    torn = tmp_path / "torn.jsonl"
    torn.write_text("\n".join([lines[0], lines[1], lines[1][:40]]))
    others = tmp_path / "others.jsonl"
    others.write_text('{"process": "nginx"}\n{"end": null}\n[1]\n{"stray": {}}\n{"event": 1}\n\n')
    tmp_path.joinpath("folder.jsonl").mkdir()
    found = log(capsys, tmp_path, status=1)
    assert found["damaged"] == [*(f"others.jsonl:{number}" for number in (1, 2, 3, 4)), "torn.jsonl:3"]
    assert [(site["bytes"], site["count"]) for site in found["strays"]] == [(128, 2)]
    assert cli.main(["log", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "cannot be read: torn.jsonl:3" in out
    assert "128 B  2 x  load: cuda:0 -> cuda:1 [repaired]" in out


def test_a_missing_or_empty_folder_is_an_error_with_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, problem in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no log")):
        assert cli.main(["log", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert problem in err
        assert "devguard run --log" in err


@pytest.mark.parametrize("options", [(), ("-W", "error")])
def test_an_unwritable_folder_causes_one_warning_and_the_program_goes_on(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    code = "stray(); stray(); print(journal.total, devguard.status()['log'])"
    out, err = run(code, tmp_path / "file" / "logs", *options)
    assert out == f"2 devguard cannot write its log to {tmp_path}/file/logs: Not a directory.\n"
    assert err.count("devguard cannot write its log") == 1


def test_status_names_the_log_file(tmp_path: Path) -> None:
    out, _ = run("print(devguard.status()['log']); journal.log.stop(); print(devguard.status()['log'])", tmp_path)
    (file,) = tmp_path.iterdir()
    assert out == f"{file}\nNone\n"


def test_counts_are_written_before_the_journal_is_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
def often():
    for _ in range(5):
        stray()
often()
journal.clear()
often()
"""
    run(code, tmp_path)
    found = log(capsys, tmp_path)
    assert sum(site["count"] for site in found["strays"]) == 10


def test_a_stray_during_the_write_of_a_row_does_not_deadlock(tmp_path: Path) -> None:
    code = """
write = log_file.os.write
def write_and_stray(descriptor, data):
    log_file.os.write = write
    stray()
    return write(descriptor, data)
log_file.os.write = write_and_stray
stray()
print("done")
"""
    assert run(code, tmp_path)[0] == "done\n"


def test_one_process_writes_one_file_even_if_importing_torch_activates_devguard(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"DEVGUARD": "repair", "DEVGUARD_LOG": str(tmp_path)}
    code = "import devguard\nwith devguard.guard('cpu'): pass"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_exit_function_does_not_stop_the_end_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
from devguard.support import process_exit
def fail(): raise ValueError("at the end")
stray()
process_exit.register(fail)
"""
    _, err = run(code, tmp_path)
    assert "could not finish in this process: ValueError: at the end" in err
    assert log(capsys, tmp_path)["processes"][0]["ended"] is True


ENDS = {
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -15),
    "os._exit": ("os._exit(3)", 3),
    "abort": ("os.abort()", -6),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_without_warning_has_its_owner_in_the_log(
    end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, status = ENDS[end]
    run("devguard.install('repair', 'cpu')\n" + code, tmp_path, status=status)
    (process,), _, damaged = log_reader.read(tmp_path)
    assert (process.owner, process.ended, damaged) == ("cpu", False, [])
    assert cli.main(["log", str(tmp_path), "--processes"]) == 0
    assert "killed or crashed (no last line); owned cpu, contexts none\n" in capsys.readouterr().out


def test_a_forked_worker_that_is_killed_has_its_owner_in_the_log(tmp_path: Path) -> None:
    code = """
devguard.install("repair", "cpu")
worker = os.fork()
if worker == 0:
    devguard.install("repair", "cpu")
    os.kill(os.getpid(), signal.SIGTERM)
os.waitpid(worker, 0)
silent = os.fork()
if silent == 0:
    os.kill(os.getpid(), signal.SIGTERM)
os.waitpid(silent, 0)
"""
    run(code, tmp_path)
    processes, _, damaged = log_reader.read(tmp_path)
    assert sorted((process.owner, process.ended) for process in processes) == [("cpu", False), ("cpu", True)]
    assert damaged == []


@pytest.mark.parametrize("reuse", ["os.open", "os.dup2", "nothing"])
def test_a_program_that_closes_all_descriptors_finds_no_log_in_its_own_files(reuse: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    taken = {
        "os.open": f"taken = [os.open({str(own)!r}, os.O_RDWR | os.O_CREAT | os.O_APPEND) for _ in range(20)]",
        "os.dup2": f"""
first = os.open({str(own)!r}, os.O_RDWR | os.O_CREAT | os.O_APPEND)
taken = [first] + [os.dup2(first, number) for number in range(first + 1, first + 20)]
""",
        "nothing": "taken = []",
    }
    code = f"""
stray(1)
os.closerange(3, 200)
{taken[reuse]}
stray(2)
journal.log.flush()
devguard.uninstall()
journal.log and journal.log.stop()
for descriptor in taken: os.fstat(descriptor)  # uninstall has closed none of them
log_file.start(Path(sys.argv[1]), last_look=table.look)
stray(3)
"""
    run(code, tmp_path / "logs")
    (process,), merged, damaged = log_reader.read(tmp_path / "logs")
    assert ([site.bytes for site in merged], process.ended, damaged) == ([3, 2, 1], True, [])
    assert not own.exists() or own.read_bytes() == b""


CHILD = """
import devguard, os, sys
devguard.install("repair", "cpu")
devguard.status()
END
"""
PARENTS = {
    "subprocess": """
import subprocess
done = subprocess.run([sys.executable, "-c", CHILD, sys.argv[1]])
""",
    "multiprocessing": """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=lambda: exec(CHILD))
child.start()
child.join()
""",
    "at the end": """
import atexit, multiprocessing
child = multiprocessing.get_context("fork").Process(target=lambda: exec(CHILD))
atexit.register(child.join)
import devguard.doors.concurrency.children
child.start()
""",
}


@pytest.mark.parametrize("parent", PARENTS)
def test_the_log_of_a_guarded_parent_tells_how_a_child_was_killed(
    parent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = CHILD.replace("END", "os.kill(os.getpid(), 9)")
    code = f"os.environ.update(DEVGUARD_LOG=sys.argv[1])\nCHILD = {child!r}\ndevguard.install('repair', 'cpu')\n"
    run(code + PARENTS[parent], tmp_path)
    assert cli.main(["log", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": killed by SIGKILL; owned cpu, contexts none\n") == 1
    assert sorted(process["end"] for process in log(capsys, tmp_path)["processes"]) == ["ended", "killed"]
