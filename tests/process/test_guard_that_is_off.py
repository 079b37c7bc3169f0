"""A guard that is off although it was asked for says so, whatever the filters of warnings; a strict process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.simulated import ROOT

PROGRAM = "import torch; print('work')"
GUARDED = "import devguard\nwith devguard.guard('cpu'):\n    print('work')"
BROKEN_DOOR = """
import sys
from devguard.support.patching import DoorError
import devguard.doors.current_device.streams as door
def fail(): raise DoorError("torch.cuda.nothing is not in torch 99")
door.install = fail
import torch
print("work")
"""

Way = tuple[dict[str, str], dict[str, str], str, str]


def no_autoload(program: str) -> Way:
    variables = {"DEVGUARD": "repair", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return variables, {}, program, "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it"


# What is wrong -> the variables, modules that cannot be imported, the program, and words of the line.
WAYS: dict[str, Way] = {
    "mode": ({"DEVGUARD": "loud"}, {}, PROGRAM, "'loud' is not a mode. Valid: off"),
    "doors": ({"DEVGUARD": "repair", "DEVGUARD_DOORS": "lod=warn"}, {}, PROGRAM, "there is no door 'lod'"),
    "device": ({"DEVGUARD": "repair", "DEVGUARD_DEVICE": "gpu"}, {}, PROGRAM, "DEVGUARD_DEVICE is 'gpu'. Valid"),
    "strict": ({"DEVGUARD": "repair", "DEVGUARD_STRICT": "maybe"}, {}, PROGRAM, "DEVGUARD_STRICT='maybe' is not valid"),
    "doors alone": ({"DEVGUARD_DOORS": "load=warn"}, {}, PROGRAM, "without DEVGUARD it has no effect"),
    "no wrapt": (
        {"DEVGUARD": "repair"},
        {"wrapt": "raise ModuleNotFoundError('No module named wrapt', name='wrapt')"},
        PROGRAM,
        "pip install 'wrapt>=2'",
    ),
    "old wrapt": (
        {"DEVGUARD": "repair"},
        {"wrapt": ""},
        PROGRAM,
        "devguard is off in this process, although DEVGUARD=",
    ),
    "broken door": ({"DEVGUARD": "repair"}, {}, BROKEN_DOOR, "the door streams stays closed in this process"),
    "no autoload": no_autoload(GUARDED),
    "no autoload, devguard, then torch": no_autoload("import devguard, torch; print('work')"),
    "no autoload, torch, then devguard": no_autoload("import torch, devguard; print('work')"),
    "no autoload, a module of devguard": no_autoload("import torch, devguard.support.callsite; print('work')"),
    "no autoload, from devguard": no_autoload("from devguard import guard; import torch.nn; print('work')"),
    "no autoload, status before torch": no_autoload(
        "import devguard; assert devguard.status()['problem'] is not None; print('work')"
    ),
}


def run(folder: Path, way: str, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables, modules, program, _ = WAYS[way]
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])} | more | variables
    return subprocess.run([sys.executable, *flags, "-c", program], env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [("-W", "ignore"), ("-W", "error")], ids=["ignore", "error"])
@pytest.mark.parametrize("way", WAYS)
def test_one_line_on_standard_error_says_so_and_the_program_goes_on(
    tmp_path: Path, way: str, flags: tuple[str, ...]
) -> None:
    done = run(tmp_path, way, *flags)
    assert (done.returncode, done.stdout) == (0, "work\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("devguard")
    assert WAYS[way][3] in line


@pytest.mark.parametrize("way", [way for way in WAYS if way != "strict"])
def test_a_strict_process_ends_with_the_reason(tmp_path: Path, way: str) -> None:
    done = run(tmp_path, way, "-W", "ignore", DEVGUARD_STRICT="1")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert WAYS[way][3] in line
    assert line.endswith("This process ends here, because DEVGUARD_STRICT=1.")


def test_a_strict_process_with_its_guard_goes_on_and_says_nothing(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"DEVGUARD": "repair", "DEVGUARD_DEVICE": "cpu", "DEVGUARD_STRICT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "work\n", "")


@pytest.mark.parametrize("program", ["import torch, devguard", "import devguard, torch", "import devguard"])
def test_the_status_says_why_the_guard_is_off(program: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"DEVGUARD": "repair", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(ROOT)}
    program += "\nimport sys; print(devguard.status()['problem'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    why = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it, or unset DEVGUARD."
    assert done.stdout == f"{why} {'torch' in program.splitlines()[0]}\n"
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"DEVGUARD": "off", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        {"DEVGUARD": "observe", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
    ],
)
@pytest.mark.parametrize("order", ["torch, devguard", "devguard, torch"])
def test_a_guard_that_is_not_asked_for_or_in_force_is_not_reported(variables: dict[str, str], order: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"DEVGUARD_STRICT": "1", "PYTHONPATH": str(ROOT)} | variables
    program = f"import {order}; assert devguard.status()['problem'] is None; print('work')"
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "work\n", "")


@pytest.mark.parametrize("command", [["--version"], ["run", "--help"], ["log", "/none"], ["run", "true"]])
def test_a_command_of_devguard_is_no_program_without_its_guard(command: list[str]) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    environ |= {"DEVGUARD": "repair", "DEVGUARD_STRICT": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "devguard", *command],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "This process ends here" not in done.stderr
    assert done.stdout or done.stderr.startswith("devguard ")
