"""``DEVGUARD`` and ``import torch``: unset it does nothing; on an error it prints one line and the program goes on.

The tests repeat the last step of torch's import, the call of the hook, in forks of one process that has imported
torch. Each case therefore starts from an unpatched torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devguard.logs import reader as log_reader
from tests.helpers import fresh
from tests.helpers.simulated import ROOT

BEFORE = """
import importlib, os, warnings
from devguard import integrations
for name in list(os.environ):
    if name.startswith("DEVGUARD") or "RANK" in name: del os.environ[name]

def patched():
    '''Return the names in torch's and multiprocessing's modules that devguard has replaced.'''
    import sys
    found = []
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] in ("torch", "multiprocessing")]:
        found += [f"{module.__name__}.{n}" for n, v in list(vars(module).items()) if is_devguards(v)]
    registry = torch.serialization._package_registry
    found += [str(row) for row in registry if is_devguards(row[1]) or is_devguards(row[2])]
    return found

def is_devguards(value):
    code = value.__code__ if type(value) is type(is_devguards) else None
    return code is not None and code.co_filename.startswith(os.path.dirname(devguard.__file__))

def load(**environ):
    '''Run the end of torch's import with these variables; return the warnings.'''
    os.environ.update(environ)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch._import_device_backends()
    return [(w.category.__name__, str(w.message)) for w in caught]

def state():
    status = devguard.status()
    return {"problem": status["problem"], "open": sorted(n for n, r in status["doors"].items() if r["open"]),
            "owner": status["process_owner"], "source": status["said_by"], "patched": patched()}
"""


@pytest.fixture(autouse=True, scope="module")
def _server() -> Iterator[None]:
    """Use one server of forks for all tests of this module."""
    yield
    fresh.stop()


def run(code: str) -> Any:
    return json.loads(fresh.run(BEFORE + "QUIET = True\n" + code)["out"].splitlines()[-1])


def python(code: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=base | environ, cwd=ROOT, capture_output=True, text=True, check=False)


def test_torch_calls_the_hook_which_imports_nothing_without_devguard_set() -> None:
    code = """
import sys, torch
names = {name for name in sys.modules if name.partition(".")[0] in ("devguard", "wrapt")}
print(*sorted(names - {"devguard._version"}))  # It only holds a number.
"""
    done = python(code, "-W", "error", DEVGUARD_LOG="/dev/null/x", DEVGUARD_DEVICE="cuda:99")
    assert done.stderr == ""
    assert done.stdout == "devguard devguard.autoload\n"


def test_a_program_that_never_imports_torch_imports_no_devguard() -> None:
    code = "import sys, multiprocessing, json; print([name for name in sys.modules if name.startswith('devguard')])"
    assert python(code, DEVGUARD="repair").stdout == "[]\n"


def test_an_invalid_value_prints_one_line_and_torch_imports_even_with_w_error() -> None:
    code = "import torch, devguard, json; print(json.dumps([torch.ones(2).tolist(), devguard.status()['problem']]))"
    done = python(code, "-W", "error", DEVGUARD="nonsense")
    assert done.returncode == 0, done.stderr
    values, problem = json.loads(done.stdout)
    assert values == [1.0, 1.0]
    assert problem == (
        "ConfigError: DEVGUARD='nonsense' is not a mode. Valid: off, observe, warn, repair, error, 0, 1."
    )
    assert done.stderr == f"devguard is off in this process, although DEVGUARD='nonsense': {problem}\n"


@pytest.mark.parametrize("value", ["", "  ", "off", "OFF", "0"])
def test_empty_and_off_open_no_door_and_do_not_warn(value: str) -> None:
    code = f"print(json.dumps([load(DEVGUARD={value!r}), state()]))"
    warned, state = run(code)
    assert warned == []
    assert state == {"problem": None, "open": [], "owner": None, "source": None, "patched": []}


@pytest.mark.parametrize("value", ["repair", "1", " Observe "])
def test_a_mode_opens_every_door_and_does_not_warn(value: str) -> None:
    warned, state = run(f"print(json.dumps([load(DEVGUARD={value!r}), state()]))")
    assert warned == []
    assert state["problem"] is None
    assert len(state["open"]) > 10
    assert state["source"] == "environment"
    assert state["patched"]


WRONG = {
    "mode": ("", {"DEVGUARD": "nonsense"}, "'nonsense' is not a mode. Valid: off, observe, warn, repair, error, 0, 1."),
    "device": ("", {"DEVGUARD_DEVICE": "gpu"}, "DEVGUARD_DEVICE is 'gpu'. Valid: a device such as 'cuda:1'"),
    "far device": ("", {"DEVGUARD_DEVICE": "cuda:99"}, "cuda:99"),
    "one device for all": ("", {"DEVGUARD_DEVICE": "cuda:0", "LOCAL_WORLD_SIZE": "2"}, "to every process of this job"),
    "door": ("", {"DEVGUARD_DOORS": "nope=1"}, "there is no door 'nope'. Doors: artefacts, bare_cuda"),
    "mode of a door": ("", {"DEVGUARD_DOORS": "load=2"}, "'2' is not a mode"),
    "log": ("", {"DEVGUARD_LOG": __file__}, "is not a directory. Name a directory"),
    "door that raises": (
        "def broken(): raise RuntimeError('boom')\n"
        "door = importlib.import_module('devguard.doors.arrivals.load')\n"
        "install = door.install\n"
        "door.install = lambda: (install(), broken())",
        {},
        "RuntimeError: boom",
    ),
    "door that cannot be imported": (
        "sys.modules['devguard.doors.current_device.streams'] = None",
        {},
        "devguard.doors.current_device.streams",
    ),
    "integration that raises": (
        "def broken(): raise OSError('no such framework')\nintegrations.arm = broken",
        {},
        "OSError: no such framework",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_during_activation_prints_one_line_and_leaves_torch_unpatched(case: str) -> None:
    before, environ, problem = WRONG[case]
    environ = {"DEVGUARD": "repair", **environ}
    code = f"""
import io, sys
{before}
printed, real = io.StringIO(), sys.stderr
sys.stderr = printed
warned = load(**{environ!r})
sys.stderr = real
print(json.dumps([warned, printed.getvalue(), state(), torch.ones(2).tolist()]))
"""
    warned, printed, state, values = run(code)
    assert values == [1.0, 1.0]
    assert warned == []
    assert (
        printed == f"devguard is off in this process, although DEVGUARD={environ['DEVGUARD']!r}: {state['problem']}\n"
    )
    assert problem in state["problem"]
    assert state["open"] == state["patched"] == []


def test_a_door_that_cannot_open_is_reported_and_the_others_open() -> None:
    code = """
door = importlib.import_module("devguard.doors.current_device.streams")
from devguard.support.patching import DoorError
def broken(): raise DoorError("torch.cuda.nothing is not in torch 99")
door.install = broken
print(json.dumps([load(DEVGUARD="repair"), state(), devguard.status()["doors"]["streams"]]))
"""
    warned, state, row = run(code)
    assert warned == []
    assert state["problem"] is None
    assert "streams" not in state["open"]
    assert len(state["open"]) > 10
    assert row["problem"] == "torch.cuda.nothing is not in torch 99"


def test_an_integration_that_cannot_be_armed_is_reported_and_the_doors_open_even_with_w_error() -> None:
    code = """
import io, sys
sys.modules["devguard.integrations.vllm"] = None
printed, real = io.StringIO(), sys.stderr
sys.stderr = printed
with warnings.catch_warnings():
    warnings.simplefilter("error")
    os.environ["DEVGUARD"] = "repair"
    torch._import_device_backends()
sys.stderr = real
print(json.dumps([printed.getvalue(), state()]))
"""
    printed, state = run(code)
    assert printed.startswith("devguard's integration with vllm is off: ")
    assert printed.count("\n") == 1
    assert state["problem"] is None
    assert len(state["open"]) > 10


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/dev/null/logs", "Not a directory"),
        ("/tmp/" + "long" * 100, "File name too long"),
        ("/proc/x", "No such file"),
    ],
)
def test_a_log_that_cannot_be_written_is_reported_once_and_the_guard_still_works(folder: str, reason: str) -> None:
    code = f"""
import contextlib, io, pickle
with contextlib.redirect_stderr(io.StringIO()) as err:
    warned = [load(DEVGUARD="repair", DEVGUARD_DEVICE="cpu", DEVGUARD_LOG={folder!r}), err.getvalue()]
from devguard.cli.selfcheck import tagged_pickle
landed = str(pickle.loads(tagged_pickle("cuda:1")).device)
print(json.dumps([warned, state(), landed, devguard.status()["log"]]))
"""
    warned, state, landed, log = run(code)
    assert landed == "cpu"
    assert state["problem"] is None
    warnings, err = warned
    assert warnings == []
    assert err == f"{log} Strays are kept in memory only.\n"
    assert log.startswith(f"devguard cannot write its log to {folder}: {reason}")


def test_after_an_invalid_value_a_guard_in_code_still_works() -> None:
    code = """
load(DEVGUARD="nonsense")
import pickle
from devguard.cli.selfcheck import tagged_pickle
with devguard.guard("cpu"): print(json.dumps(str(pickle.loads(tagged_pickle("cuda:1")).device)))
"""
    assert run(code) == "cpu"


# Why the guard that is asked for is off: what runs before `import torch`, and the variables.
OFF = {
    "no wrapt": ("sys.modules['wrapt'] = None", {}),
    "wrapt that raises": ("sys.path.insert(0, sys.argv[1])", {}),
    "a mode that is not valid": ("", {"DEVGUARD": "fix"}),
    "a device that is not valid": ("", {"DEVGUARD_DEVICE": "gpu"}),
    "doors without a mode": ("", {"DEVGUARD": "", "DEVGUARD_DOORS": "load=warn"}),
    "a module of a door that is missing": ("sys.modules['devguard.doors.arrivals.load'] = None", {}),
    "a door that stays closed": (
        "from devguard.support.patching import DoorError\n"
        "def fail(): raise DoorError('no such function')\n"
        "import devguard.doors.arrivals.load as door; door.install = fail",
        {},
    ),
    "torch does not load devguard": ("", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
}


@pytest.mark.parametrize("strict", ["0", "1"])
@pytest.mark.parametrize("case", OFF)
def test_an_alert_is_in_the_log_once_also_where_devguard_could_not_be_activated(
    case: str, strict: str, tmp_path: Path
) -> None:
    before, environ = OFF[case]
    (tmp_path / "wrapt.py").write_text("raise RuntimeError('broken')\n")
    logs = tmp_path / "new" / "logs"
    environ = {"DEVGUARD": "repair", "DEVGUARD_LOG": str(logs), "DEVGUARD_STRICT": strict, **environ}
    code = f"import sys; sys.argv.append({str(tmp_path)!r})\n{before}\nimport torch, devguard\n"
    code += "with devguard.guard('cpu'): print('ran')" if "AUTOLOAD" in str(environ) else "print('ran')"
    done = python(code, "-W", "ignore", **environ)
    assert (done.returncode, done.stdout) == ((2, "") if strict == "1" else (0, "ran\n")), done.stderr
    (process,), _, damaged = log_reader.read(logs)
    assert damaged == []
    assert process.alerts == done.stderr.splitlines()
    assert len(process.alerts) == 1
    assert logs.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("obstacle", ["a file", "a pipe", "below a file"])
def test_an_alert_that_no_log_can_take_is_still_printed(obstacle: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    os.mkfifo(logs) if obstacle == "a pipe" else logs.write_text("")
    folder = logs / "x" if obstacle == "below a file" else logs
    done = python("import torch; print('ran')", DEVGUARD="fix", DEVGUARD_LOG=str(folder))
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "DEVGUARD='fix' is not a mode" in done.stderr
    assert done.stderr.count("\n") == 1
