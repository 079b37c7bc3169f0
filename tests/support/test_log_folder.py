"""A relative ``DEVGUARD_LOG`` and programs that change their working directory: the log stays where they started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.simulated import ROOT

LOCATE = "from devguard.support import log_folder; print(log_folder.locate(), os.environ['DEVGUARD_LOG'])"
PROGRAMS = ("train.py", "jobs/train.py", "./jobs/../train.py", "-m train", "-m jobs.train", "-m jobs")
# The lines in a log folder that name a process, and their number: program, child by subprocess, spawned and forked one.
PROCESSES = 4
GUARDED = """
import multiprocessing, os, subprocess, sys
{before}
import torch
{later}
import devguard
def work(): pass
if __name__ == "__main__":
    subprocess.run([sys.executable, "-c", "import os; os.chdir('/'); import torch"], check=True)
    for method in ("spawn", "fork"):
        child = multiprocessing.get_context(method).Process(target=work)
        child.start(); child.join()
    print(devguard.status()["log"])
"""


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """The folder in which programs start; beside it lies another one."""
    for folder in ("start/jobs", "other/deep"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path / "start"


def write(start: Path, code: str) -> None:
    for name in ("train.py", "jobs/train.py", "jobs/__main__.py"):
        (start / name).write_text(code)


def run(start: Path, *words: str, log: str = "logs", **environ: str) -> str:
    base = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    base |= {"PYTHONPATH": str(ROOT), "DEVGUARD_LOG": log, **environ}
    done = subprocess.run(
        [sys.executable, *words], cwd=start, env=base, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_relative_folder_counts_from_the_start_after_a_change_of_directory(start: Path, program: str) -> None:
    write(start, f"import os, sys\nos.chdir('../other/deep')\n{LOCATE}")
    assert run(start, *program.split(), "train.py") == f"{start}/logs {start}/logs"


@pytest.mark.parametrize("log", [" logs ", "./logs", "../start/logs"])
def test_the_folder_is_made_absolute_without_dots_and_spaces(start: Path, log: str) -> None:
    write(start, f"import os\n{LOCATE}\nos.chdir('/')\n{LOCATE}")
    assert run(start, "train.py", log=log) == "\n".join([f"{start}/logs {start}/logs"] * 2)


def test_an_absolute_folder_stays_as_it_is(start: Path) -> None:
    write(start, f"import os\nos.chdir('/')\n{LOCATE}")
    assert run(start, "train.py", log="/a/b/../c") == "/a/c /a/b/../c"


def test_a_module_that_python_runs_for_a_program_that_extends_its_path_counts_from_the_start(start: Path) -> None:
    write(start, f"import os, sys\nsys.path.insert(0, {str(start.parent)!r})\n{LOCATE}")
    assert run(start, "-m", "train") == f"{start}/logs {start}/logs"


@pytest.mark.parametrize("words", [["-c", f"import os; {LOCATE}"], ["{start}/train.py", "train.py"]])
def test_where_nothing_shows_the_start_a_relative_folder_counts_from_the_first_look(
    start: Path, words: list[str]
) -> None:
    write(start, f"import os\n{LOCATE}\nos.chdir('/')\n{LOCATE}")
    assert set(run(start, *(word.format(start=start) for word in words)).splitlines()) == {f"{start}/logs {start}/logs"}


def test_a_working_directory_that_was_removed_leaves_the_folder_relative(start: Path) -> None:
    code = f"import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); {LOCATE}"
    assert run(start, "-c", code) == "logs logs"


def test_an_unset_variable_names_no_folder(start: Path) -> None:
    assert run(start, "-c", f"import os; {LOCATE}", log="  ") == "None"


@pytest.mark.parametrize("program", ["train.py", "-m jobs.train"])
@pytest.mark.parametrize("when", ["before", "later"])
def test_program_and_children_write_to_one_folder(start: Path, program: str, when: str) -> None:
    change = dict.fromkeys(("before", "later"), "") | {when: "os.chdir('../other')"}
    write(start, GUARDED.format(**change))
    where = run(start, *program.split(), DEVGUARD="observe", DEVGUARD_DEVICE="cpu")
    assert Path(where).parent == start / "logs"
    logs = sorted(start.parent.rglob("*.jsonl"))
    assert [log.parent for log in logs] == [start / "logs"] * PROCESSES
    assert len({json.loads(log.read_text().splitlines()[0])["process"]["pid"] for log in logs}) == PROCESSES


def test_a_guard_in_code_writes_to_the_folder_of_the_import_of_torch(start: Path) -> None:
    code = "import os, torch; os.chdir('../other'); import devguard; devguard.guard('cpu').__enter__()"
    run(start, "-c", code)
    assert [path.parent for path in start.parent.rglob("*.jsonl")] == [start / "logs"]


def test_the_alert_of_a_guard_that_is_off_is_in_the_folder_too(start: Path) -> None:
    code = "import os\nos.chdir('../other')\nfrom devguard.support import notices\nnotices.print_error = print\n"
    write(start, f"{code}notices.alert('the guard is off')")
    assert run(start, "train.py") == "the guard is off"
    assert [path.parent for path in start.parent.rglob("*.jsonl")] == [start / "logs"]
