"""Work on a GPU that the program names refutes a guessed owner; what leaked there does not.

Each program is one of several processes without a launcher's rank, as a `multiprocessing` child is.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devguard.activation.activate import activate
from devguard.cli.selfcheck import tagged_pickle
from tests.helpers import fresh

SEVERAL = {"LOCAL_WORLD_SIZE": "4"}


@pytest.fixture(autouse=True, scope="module")
def _server() -> Iterator[None]:
    yield
    fresh.stop()


def run(code: str, **environ: str) -> Any:
    """Run `code` under ``DEVGUARD=repair``; return the value of the expression on its last line, and the alerts.

    ``loads(*tags)`` unpickles tensors with these tags and returns the indices of their devices.
    """
    before = f"""
import io, os, pickle, warnings
from devguard.activation.activate import activate
from devguard.cli.selfcheck import tagged_pickle
from devguard.support import notices
notices.print_error = lambda text: True
warnings.simplefilter("ignore")
QUIET = True
def loads(*tags): return [pickle.loads(tagged_pickle(tag)).device.index for tag in tags]
def make(index): return torch.ones(4).to(f"cuda:{{index}}")
def demoted(): return devguard.status()["adoption"]["demoted"]
activate({{"DEVGUARD": "repair", **{environ or SEVERAL!r}}})
"""
    *lines, last = code.strip().splitlines()
    code = "\n".join([*lines, f"value = {last}", "print(json.dumps([value, notices.alerts()]))"])
    return json.loads(fresh.run(before + code)["out"])


# Work on cuda:{i} by name. Each leaves memory there, or has left it.
NAMED = {
    "a tensor made there": "kept = torch.empty(4, device='cuda:{i}')",
    "a tensor that is gone": "torch.empty(4, device=torch.device('cuda', {i}))",
    "a tensor moved there": "kept = torch.ones(4).to('cuda:{i}')",
    "cuda(index)": "kept = torch.ones(4).cuda({i})",
    "a module": "kept = torch.nn.Linear(4, 4).to('cuda:{i}')",
    "a device context": "with torch.cuda.device({i}): kept = torch.empty(4, device='cuda')",
    "a default device": "with torch.device('cuda:{i}'): kept = torch.empty(4)",
    "a stream context": "with torch.cuda.stream(torch.cuda.Stream({i})): kept = torch.empty(4, device='cuda')",
    "map_location": (
        "file = io.BytesIO(); torch.save(torch.ones(4), file); file.seek(0)\n"
        "kept = torch.load(file, map_location='cuda:{i}')"
    ),
    "a guard": "with devguard.guard({i}): kept = torch.empty(4, device='cuda')",
    "a replica of DataParallel": (
        "model = torch.nn.DataParallel(torch.nn.Linear(4, 4).to('cuda:{g}'), device_ids=[{g}, {i}])\n"
        "kept = model.replicate(model.module, model.device_ids)"
    ),
    "a thread with a device of its own": (
        "import threading\n"
        "def work():\n  torch.cuda.set_device({i}); kept.append(torch.empty(4, device='cuda'))\n"
        "kept = []; thread = threading.Thread(target=work); thread.start(); thread.join()"
    ),
    "a device that was selected for it": (
        "torch.cuda.set_device({i}); kept = torch.empty(4, device='cuda'); torch.cuda.set_device({g})"
    ),
}
PAIRS = [(2, 3), (0, 1), (3, 1)]


@pytest.mark.parametrize(("guess", "other"), PAIRS)
@pytest.mark.parametrize("how", NAMED)
def test_named_work_before_the_first_stray_refutes_the_guess(how: str, guess: int, other: int) -> None:
    work = NAMED[how].format(i=other, g=guess)
    code = f"torch.cuda.set_device({guess})\n{work}\n[loads('cuda:{guess}', 'cuda:{other}'), demoted()]"
    (found, demoted), alerts = run(code)
    assert (found, demoted) == ([guess, other], True)
    (text,) = alerts
    assert f"cuda:{guess} (from set_device), but the program also works on cuda:{other} by name" in text
    assert "now only observes" in text


@pytest.mark.parametrize("how", [how for how in NAMED if "thread" not in how])
def test_named_work_after_the_first_stray_refutes_the_guess_too(how: str) -> None:
    work = NAMED[how].format(i=3, g=2)
    code = f"torch.cuda.set_device(2)\nfirst = loads('cuda:0')\n{work}\n[first, loads('cuda:2', 'cuda:3'), demoted()]"
    assert run(code)[0] == [[2], [2, 3], True]


def test_named_work_after_a_stray_of_the_same_line_and_device_refutes_the_guess() -> None:
    code = """
torch.cuda.set_device(2)
found = []
for step in range(4):
    found += loads('cuda:3')
    if step == 1: kept = make(3)
[found, demoted()]
"""
    assert run(code)[0] == [[2, 2, 3, 3], True]


def test_named_work_before_the_device_is_selected_refutes_the_guess() -> None:
    assert run("kept = make(3); torch.cuda.set_device(2)\n[loads('cuda:2', 'cuda:3'), demoted()]")[0] == [[2, 3], True]


def test_named_work_on_device_0_refutes_a_guess_that_is_not_the_launchers() -> None:
    assert run("torch.cuda.set_device(1); kept = make(0)\n[loads('cuda:0', 'cuda:1'), demoted()]")[0] == [[0, 1], True]


def test_a_checkpoint_of_two_gpus_stays_on_them_in_a_process_that_works_on_both() -> None:
    code = """
torch.cuda.set_device(2)
parts = torch.nn.ModuleList([torch.nn.Linear(4, 4).to("cuda:2"), torch.nn.Linear(4, 4).to("cuda:3")])
file = io.BytesIO(); torch.save(parts.state_dict(), file); file.seek(0)
[tensor.device.index for tensor in torch.load(file).values()]
"""
    assert run(code)[0] == [2, 2, 3, 3]


def test_error_mode_does_not_refuse_what_the_program_works_with_by_name() -> None:
    code = "torch.cuda.set_device(2); kept = make(3)\n[loads('cuda:3'), demoted()]"
    assert run(code, DEVGUARD="error", **SEVERAL)[0] == [[3], True]


def test_a_context_on_another_gpu_is_looked_at_when_the_status_is_read() -> None:
    assert run("torch.cuda.set_device(2); kept = make(3)\n[devguard.status()['adoption']['demoted']]")[0] == [True]


# What a process did before it had an owner, or without naming a device. None of it is proof.
LEAKS = {
    "a tensor at import": "kept = torch.empty(4, device='cuda')\ntorch.cuda.set_device(1)",
    "data by its tag, before": "kept = loads('cuda:0', 'cuda:3')\ntorch.cuda.set_device(1)",
    "a loop over the devices": (
        "for i in range(4): torch.cuda.set_device(i); torch.empty(4, device='cuda')\ntorch.cuda.set_device(1)"
    ),
    "queries": "torch.cuda.set_device(1)\nfor i in range(4): torch.cuda.mem_get_info(i)",
    "streams": "torch.cuda.set_device(1)\nkept = [torch.cuda.Stream(i) for i in range(4)]",
    "device contexts without memory": (
        "torch.cuda.set_device(1)\nfor i in range(4):\n  with torch.cuda.device(i): torch.cuda.synchronize()"
    ),
    "an empty guard": "torch.cuda.set_device(1)\nwith devguard.guard(3): pass",
    "unguarded": "torch.cuda.set_device(1)\nwith devguard.unguarded(): kept = make(3)",
    "an allowed device": "torch.cuda.set_device(1); devguard.allow('cuda:3'); kept = make(3)",
    "own memory": "torch.cuda.set_device(1); kept = make(1)",
    "a repaired message": "torch.cuda.set_device(1); loads('cuda:3', 'cuda:0', 'cuda:2')",
}


@pytest.mark.parametrize("how", LEAKS)
def test_what_leaked_before_is_no_proof_and_strays_are_repaired(how: str) -> None:
    code = f"{LEAKS[how]}\n[loads('cuda:0', 'cuda:2'), demoted()]"
    (found, demoted), alerts = run(code)
    assert (found, demoted, alerts) == ([1, 1], False, [])


LAUNCHED = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_memory_on_device_0_is_no_proof_in_a_launched_process() -> None:
    for choice in ("", "torch.cuda.set_device(1)\n"):
        code = f"{choice}kept = make(0)\n[loads('cuda:0', 'cuda:2'), demoted()]"
        assert run(code, **LAUNCHED)[0] == [[1, 1], False]


def test_a_launched_process_that_works_on_two_gpus_by_name_is_left_alone() -> None:
    """As a model in two parts, of which local rank 1 owns cuda:2 and cuda:3."""
    code = "kept = [make(2), make(3)]\n[loads('cuda:2', 'cuda:3'), demoted()]"
    assert run(code, **LAUNCHED)[0] == [[2, 3], True]


def test_a_named_device_is_no_guess() -> None:
    code = "kept = make(3)\n[loads('cuda:3'), demoted()]"
    assert run(code, DEVGUARD_DEVICE="cuda:1")[0] == [[1], False]


def test_an_allocator_without_statistics_proves_nothing() -> None:
    code = """
def no_statistics(index): raise RuntimeError("does not yet support getDeviceStats")
torch.cuda.set_device(1); kept = make(3)
torch._C._cuda_memoryStats = no_statistics
[loads('cuda:0'), demoted()]
"""
    assert run(code)[0] == [[1], False]


def work_on_two_gpus(answers: Any) -> None:
    activate({"DEVGUARD": "repair"})
    torch.cuda.set_device(2)
    parts = [torch.ones(4).to("cuda:2"), torch.ones(4).to("cuda:3")]
    found = [pickle.loads(tagged_pickle(f"cuda:{index}")).device.index for index in (2, 3, 0)]
    answers.put((found, len(parts)))


def test_a_spawned_child_that_owns_two_gpus_keeps_both() -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=work_on_two_gpus, args=(answers,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert answers.get() == ([2, 3, 0], 2)
