"""The door ``triton`` on simulated GPUs, with a stand-in for Triton; tests/real_triton.py uses the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import triton_stand_in
from tests.helpers.programs import run_child

PRELUDE = """
import json, sys
sys.path.insert(0, sys.argv[1])
mode = sys.argv[2]
import torch, devguard
from devguard.reporting.journal import journal
ctx = lambda: [d.index for d in devguard.contexts()]
scope = devguard.guard(1, mode=mode) if mode != "unguarded" else torch.cuda.device(1)
with devguard.guard(1): pass
from triton.runtime.jit import JITFunction, Heuristics, TensorWrapper, constexpr
from triton.runtime.autotuner import Autotuner
make = lambda index: torch.empty(4, device=f"cuda:{index}")
kernel = JITFunction(lambda *args, **kwargs: "result")
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """Write a package ``triton`` under ``site-packages``; return the folder to put on ``sys.path``."""
    return triton_stand_in.write(tmp_path)


def child(code: str, folder: Path, mode: str = "repair", prelude: str = PRELUDE) -> Any:
    """Run `code` in a fresh process; return the JSON that it prints."""
    return json.loads(run_child(code, prelude=prelude, arguments=[str(folder), mode], options=["-W", "error"]))


# Each launch: the current device, the devices of the arguments, and how the arguments are passed.
LAUNCHES = """
import warnings
warnings.simplefilter("always")
out = {}
def launch(what, current, *arguments, **named):
    journal.clear(); kernel.launched.clear()
    with scope, torch.cuda.device(current):
        try: result = kernel[(1,)](*arguments, **named)
        except devguard.StrayDeviceError as error: result = "refused"
        assert torch.cuda.current_device() == current
    rows = [(s.source, s.target, s.action, s.count, s.site.function) for s in journal.strays() if s.door == "triton"]
    out[what] = [result, list(kernel.launched), rows]
launch("own", 1, make(1), 3, make(1))
launch("current", 2, make(1), 3, make(1))
launch("current named", 2, x=make(1), n=3, B=constexpr(4))
launch("current wrapped", 2, TensorWrapper(make(1)), "text", None, 1.0)
launch("current nested", 2, (make(1), (3, make(1))), torch.ones(2))
launch("foreign", 1, make(2))
launch("foreign current", 2, make(2))
launch("several", 1, make(1), make(0), make(2))
launch("none", 2, torch.ones(2), 3)
print(json.dumps(out))
"""
OWN_REPAIRED = ["result", [1], [["cuda:2", "cuda:1", "repaired", 1, "launch"]]]


def left(current: int, source: str, action: str) -> list[Any]:
    return ["result", [current], [[source, source, action, 1, "launch"]]]


EXPECTED: dict[str, dict[str, list[Any]]] = {
    "unguarded": {
        "own": ["result", [1], []],
        "current": ["result", [2], []],
        "foreign": ["result", [1], []],
        "several": ["result", [1], []],
    },
    "repair": {
        "current": OWN_REPAIRED,
        "current named": OWN_REPAIRED,
        "current wrapped": OWN_REPAIRED,
        "current nested": OWN_REPAIRED,
        "foreign": left(2, "cuda:2", "observed"),
        "foreign current": left(2, "cuda:2", "observed"),
        "several": left(1, "cuda:0,cuda:2", "observed"),
    },
    "observe": {
        "current": left(2, "cuda:2", "observed"),
        "foreign": left(1, "cuda:2", "observed"),
        "foreign current": left(2, "cuda:2", "observed"),
        "several": left(1, "cuda:0,cuda:2", "observed"),
    },
    "warn": {"current": left(2, "cuda:2", "warned"), "several": left(1, "cuda:0,cuda:2", "warned")},
    "error": {
        "current": ["refused", [], [["cuda:2", "cuda:2", "refused", 1, "launch"]]],
        "foreign": ["refused", [], [["cuda:2", "cuda:2", "refused", 1, "launch"]]],
        "several": ["refused", [], [["cuda:0,cuda:2", "cuda:0,cuda:2", "refused", 1, "launch"]]],
    },
    "off": {"current": ["result", [2], []], "foreign": ["result", [1], []], "several": ["result", [1], []]},
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_each_launch_follows_the_mode(mode, stand_in):
    got = child(LAUNCHES, stand_in, mode)
    assert got["own"] == ["result", [1], []]
    assert got["none"] == ["result", [2], []]
    assert {what: got[what] for what in EXPECTED[mode]} == EXPECTED[mode]


def test_a_tuner_times_on_the_owner_and_each_launch_is_recorded_once_through_every_wrapper(stand_in):
    code = """
out = []
for mode in ("repair", "observe"):
    for wrapped in (Heuristics(kernel), Autotuner(kernel), Heuristics(Autotuner(kernel))):
        journal.clear(); kernel.launched.clear()
        x = make(1)
        with devguard.guard(1, mode=mode), torch.cuda.device(2):
            wrapped[(1,)](x, 3)
        rows = [[s.action, s.count] for s in journal.strays() if s.door == "triton"]
        tuner = wrapped if isinstance(wrapped, Autotuner) else wrapped.fn
        out.append([sorted(set(kernel.launched)), getattr(tuner, "timed_on", []), rows])
print(json.dumps(out))
"""
    repaired, observed = [["repaired", 1]], [["observed", 1]]
    assert child(code, stand_in) == [
        [[1], [], repaired],
        [[1], [1], repaired],
        [[1], [1], repaired],
        [[2], [], observed],
        [[2], [2], observed],
        [[2], [2], observed],
    ]


def test_after_an_error_in_the_kernel_the_device_is_given_back(stand_in):
    code = """
def fails(*args): raise ValueError("from the kernel")
kernel.fn = fails
with devguard.guard(1), torch.cuda.device(2):
    for _ in range(2):
        try: kernel[(1,)](make(1))
        except ValueError as error: last = str(error)
    current = torch.cuda.current_device()
print(json.dumps([last, current, kernel.launched]))
"""
    assert child(code, stand_in) == ["from the kernel", 2, [1, 1]]


def test_the_launch_opens_no_context_on_the_current_device(stand_in):
    # A new thread starts on device 0, where restoring the device after the launch must not open a context.
    code = """
import _thread
done = _thread.allocate_lock(); done.acquire()
x, found = make(1), []
def work():
    with devguard.guard(1):
        torch._C._cuda_maybeExchangeDevice(0)
        kernel[(1,)](x)
        found.append(ctx())
    done.release()
_thread.start_new_thread(work, ()); done.acquire()
print(json.dumps([found, kernel.launched]))
"""
    assert child(code, stand_in) == [[[1]], [1]]


def test_unguarded_and_allowed_launches_are_left_alone(stand_in):
    code = """
with devguard.guard(1), devguard.unguarded(), torch.cuda.device(2):
    kernel[(1,)](make(1), make(0))
devguard.allow("cuda:2")
with devguard.guard(1, mode="error"), torch.cuda.device(2):
    kernel[(1,)](make(2))
print(json.dumps([kernel.launched, len(journal.strays())]))
"""
    assert child(code, stand_in) == [[2, 2], 0]


def test_uninstall_restores_and_a_later_guard_watches_again(stand_in):
    code = """
watched = JITFunction.run, Autotuner.run
row = devguard.status()["doors"]["triton"]
left = devguard.uninstall()
own = [not hasattr(f, "__wrapped__") for f in (JITFunction.run, Autotuner.run)]
devguard.uninstall()
with devguard.guard(1), torch.cuda.device(2):
    kernel[(1,)](make(1))
restored = [w.__wrapped__ for w in watched] == [JITFunction.run.__wrapped__, Autotuner.run.__wrapped__]
print(json.dumps([row["watched"], left, own, restored, kernel.launched]))
"""
    assert child(code, stand_in) == [["JITFunction", "Autotuner"], [], [True, True], True, [1]]


def test_triton_imported_before_the_door_opens_or_while_it_is_closed_is_watched(stand_in):
    before = PRELUDE.replace("import torch, devguard\n", "import torch, devguard, triton.runtime.autotuner\n", 1)
    closed = PRELUDE.replace("with devguard.guard(1): pass\n", "with devguard.guard(1): pass\ndevguard.uninstall()\n")
    code = """
with devguard.guard(1), torch.cuda.device(2):
    kernel[(1,)](make(1))
print(json.dumps(kernel.launched))
"""
    assert child(code, stand_in, prelude=before) == [1]
    assert child(code, stand_in, prelude=closed) == [1]


def test_a_triton_without_a_known_function_is_a_problem_in_the_status(stand_in):
    (stand_in / "triton" / "runtime" / "autotuner.py").write_text("class Autotuner: pass\n")
    code = 'print(json.dumps(devguard.status()["doors"]["triton"]))'
    row = child(code, stand_in)
    assert row["watched"] == ["JITFunction"]
    assert "triton.runtime.autotuner.Autotuner.run" in row["problem"]
