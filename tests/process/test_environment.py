"""``DEVGUARD`` against ``import torch``: inert where it is unset, and what is wrong costs one warning, no program.

What torch calls at the end of its import is called again here in forks of one process that has imported it, so that
each case starts from a torch that nobody has patched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import fresh
from tests.helpers.simulated import ROOT

BEFORE = """
import importlib, os, warnings
from devguard import integrations
for name in list(os.environ):
    if name.startswith("DEVGUARD") or "RANK" in name: del os.environ[name]

def patched():
    '''The names in torch's and multiprocessing's modules that devguard has replaced.'''
    import sys
    found = []
    for module in [m for n, m in sys.modules.items() if n.partition(".")[0] in ("torch", "multiprocessing")]:
        found += [f"{module.__name__}.{n}" for n, v in list(vars(module).items()) if ours(v)]
    found += [str(row) for row in torch.serialization._package_registry if ours(row[1]) or ours(row[2])]
    return found

def ours(value):
    code = value.__code__ if type(value) is type(ours) else None
    return code is not None and code.co_filename.startswith(os.path.dirname(devguard.__file__))

def load(**environ):
    '''What torch does at the end of its import, with these variables.'''
    os.environ.update(environ)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch._import_device_backends()
    return [(w.category.__name__, str(w.message)) for w in caught]

def stands():
    status = devguard.status()
    return {"problem": status["problem"], "open": sorted(n for n, r in status["doors"].items() if r["open"]),
            "mode": status["process_owner"], "said_by": status["said_by"], "patched": patched()}
"""


@pytest.fixture(autouse=True, scope="module")
def _server() -> Iterator[None]:
    """One server of forks for all tests here."""
    yield
    fresh.stop()


def run(code: str) -> Any:
    return json.loads(fresh.run(BEFORE + "QUIET = True\n" + code)["out"].splitlines()[-1])


def python(code: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD")}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=base | environ, cwd=ROOT, capture_output=True, text=True, check=False)


def test_torch_finds_the_hook_and_without_the_variable_it_imports_nothing() -> None:
    code = """
import sys, torch
names = {name for name in sys.modules if name.partition(".")[0] in ("devguard", "wrapt")}
print(*sorted(names - {"devguard._version"}))  # which holds a number
"""
    done = python(code, "-W", "error", DEVGUARD_LOG="/dev/null/x", DEVGUARD_DOORS="nope=1", DEVGUARD_DEVICE="cuda:99")
    assert done.stderr == ""
    assert done.stdout == "devguard devguard.autoload\n"


def test_a_program_that_never_imports_torch_imports_no_devguard() -> None:
    code = "import sys, multiprocessing, json; print([name for name in sys.modules if name.startswith('devguard')])"
    assert python(code, DEVGUARD="repair").stdout == "[]\n"


def test_a_wrong_value_is_one_line_under_w_error_in_a_whole_import() -> None:
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
def test_unset_empty_and_off_open_nothing_and_say_nothing(value: str) -> None:
    code = f"print(json.dumps([load(DEVGUARD={value!r}), stands()]))"
    said, stands = run(code)
    assert said == []
    assert stands == {"problem": None, "open": [], "mode": None, "said_by": None, "patched": []}


@pytest.mark.parametrize("value", ["repair", "1", " Observe "])
def test_a_mode_opens_every_door_without_a_word(value: str) -> None:
    said, stands = run(f"print(json.dumps([load(DEVGUARD={value!r}), stands()]))")
    assert said == []
    assert stands["problem"] is None
    assert len(stands["open"]) > 10
    assert stands["said_by"] == "environment"
    assert stands["patched"]


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
def test_whatever_is_wrong_costs_one_warning_and_leaves_torch_as_it_was(case: str) -> None:
    before, environ, said = WRONG[case]
    environ = {"DEVGUARD": "repair", **environ}
    code = f"import sys\n{before}\nprint(json.dumps([load(**{environ!r}), stands(), torch.ones(2).tolist()]))"
    warned, stands, values = run(code)
    assert values == [1.0, 1.0]
    ((category, text),) = warned
    assert category == "RuntimeWarning"
    assert text == f"devguard is off in this process, although DEVGUARD={environ['DEVGUARD']!r}: {stands['problem']}"
    assert said in stands["problem"]
    assert stands["open"] == stands["patched"] == []


def test_a_door_that_this_torch_does_not_know_is_named_and_the_others_open() -> None:
    code = """
door = importlib.import_module("devguard.doors.current_device.streams")
from devguard.support.patching import DoorError
def broken(): raise DoorError("torch.cuda.nothing is not in torch 99")
door.install = broken
print(json.dumps([load(DEVGUARD="repair"), stands(), devguard.status()["doors"]["streams"]]))
"""
    said, stands, row = run(code)
    assert said == []
    assert stands["problem"] is None
    assert "streams" not in stands["open"]
    assert len(stands["open"]) > 10
    assert row["problem"] == "torch.cuda.nothing is not in torch 99"


def test_an_integration_that_cannot_be_armed_is_named_and_costs_no_guard_also_under_w_error() -> None:
    code = """
import io, sys
sys.modules["devguard.integrations.vllm"] = None
said, real = io.StringIO(), sys.stderr
sys.stderr = said
with warnings.catch_warnings():
    warnings.simplefilter("error")
    os.environ["DEVGUARD"] = "repair"
    torch._import_device_backends()
sys.stderr = real
print(json.dumps([said.getvalue(), stands()]))
"""
    said, stands = run(code)
    assert said.startswith("devguard does not know the processes of vllm: ")
    assert said.count("\n") == 1
    assert stands["problem"] is None
    assert len(stands["open"]) > 10


def test_a_log_that_cannot_be_written_costs_one_warning_and_no_guard() -> None:
    code = """
warned = load(DEVGUARD="repair", DEVGUARD_DEVICE="cpu", DEVGUARD_LOG="/dev/null/logs")
import pickle
from devguard.cli.selfcheck import tagged_pickle
landed = str(pickle.loads(tagged_pickle("cuda:1")).device)
print(json.dumps([warned, stands(), landed, devguard.status()["log"]]))
"""
    warned, stands, landed, log = run(code)
    assert landed == "cpu"
    assert stands["problem"] is None
    ((category, text),) = warned
    assert category == "RuntimeWarning"
    assert text.startswith(log)
    assert log == "devguard cannot write its log to /dev/null/logs: Not a directory."


def test_after_a_wrong_value_a_guard_in_code_still_works() -> None:
    code = """
load(DEVGUARD="nonsense")
import pickle
from devguard.cli.selfcheck import tagged_pickle
with devguard.guard("cpu"): print(json.dumps(str(pickle.loads(tagged_pickle("cuda:1")).device)))
"""
    assert run(code) == "cpu"
