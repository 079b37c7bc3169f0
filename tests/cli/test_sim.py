"""``devguard sim``: run a program on simulated GPUs, show a state file, and refuse bad options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from devguard import cli
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated GPUs exist for Linux only")


def sim(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "devguard", "sim", *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def test_a_script_runs_with_its_own_arguments_and_exit_status(tmp_path: Path) -> None:
    script, state, log = tmp_path / "train.py", tmp_path / "state", tmp_path / "log"
    script.write_text(
        "import sys, torch\n"
        "assert torch.cuda.device_count() == 4 and torch.cuda.mem_get_info(3)[1] == 2 << 30\n"
        "x = torch.zeros(5 << 20, dtype=torch.uint8, device='cuda:3')\n"
        "print(sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    options = ["--gpus", 4, "--memory", "2G", "--state", "state", "--log", "log"]
    done = sim(*options, "--", sys.executable, "train.py", "--gpus", "9", "--", "-x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, "['--gpus', '9', '--', '-x']\n"), done.stderr
    assert "3 malloc" in log.read_text()

    shown = sim("--state", state)
    assert shown.returncode == 0
    assert "train.py" in shown.stdout
    assert "20 (20)" in shown.stdout
    (process,) = json.loads(sim("--state", state, "--json").stdout)["processes"]
    assert (process["name"], process["alive"]) == ("train.py", False)
    assert [device["context"] for device in process["devices"]] == [False, False, False, True]
    assert process["devices"][3]["bytes"] == 20 << 20
    assert sim("--state", script).returncode == 2  # no state file


def test_a_program_that_does_not_exist_returns_127() -> None:
    done = sim("--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "devguard sim: there is no program 'no-such-program' on PATH\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "from 1 to 16"),
        (["--gpus", "17"], "from 1 to 16"),
        (["--memory", "lots"], "such as 8G"),
        (["--memory", "1M"], "too small"),
        (["--torch", "1.13"], "too old"),
    ],
)
def test_bad_options_return_2_and_print_what_is_valid(options: list[str], message: str) -> None:
    done = sim(*options, "--", "true")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sim(*options).returncode == 2  # without a program, too


def test_a_program_that_is_another_python_causes_a_warning(tmp_path: Path) -> None:
    other = tmp_path / "python3.99"
    other.write_text("#!/bin/sh\necho ran $DEVGUARD_SIM_GPUS\n")
    other.chmod(0o755)
    done = sim("--", "python3.99", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout == "ran 2\n"
    assert "warning" in done.stderr
    assert sys.executable in done.stderr


def test_without_a_program_the_simulation_is_prepared() -> None:
    done = sim()
    assert done.returncode == 0
    assert done.stdout.startswith("ready: simulated GPUs for torch ")
    ready = json.loads(sim("--json").stdout)
    assert ready["ready"] is True
    assert Path(ready["overlay"]).is_dir()


def test_help_does_not_import_torch() -> None:
    code = """if True:
        import sys
        from devguard.cli import main
        try:
            main(["sim", "--help"])
        finally:
            print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
    assert "devguard sim [options] -- COMMAND" in done.stdout


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "G", "9" * 5000, "1." + "0" * 5000, "\u0663G", "1e400"])
def test_a_size_of_many_digits_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert cli.main(["sim", "--memory", text, "true"]) == 2
    err = capsys.readouterr().err
    assert "this is not a size. Valid: a size such as 8G" in err
    assert len(err) < 300


@pytest.mark.parametrize("option", ["--torch", "--memory", "--state", "--log"])
def test_an_empty_value_is_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert cli.main(["sim", option, "", "true"]) == 2
    assert f"{option} has an empty value" in capsys.readouterr().err
