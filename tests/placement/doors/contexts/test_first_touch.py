"""The door ``first_touch``: the line that initialised CUDA, in fresh processes where CUDA is not initialised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors import table
from devguard.doors.contexts import first_touch
from devguard.support import accelerator
from tests.helpers import fresh

WATCH = "from devguard.doors import table; table.open_all()\n"
TOUCH = "x = torch.ones(1, device='cuda')\n"

WAYS = {
    "operator": "torch.ones(1, device='cuda:1')",
    "to": "torch.ones(1).to('cuda')",
    "init": "torch.cuda.init()",
    "set_device": "torch.cuda.set_device(1)",
    "properties": "torch.cuda.get_device_properties(0)",
    "accelerator": "torch.accelerator.set_device_index(1)",
}


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    yield
    fresh.stop()


def strays(code: str) -> list[dict[str, Any]]:
    return fresh.strays(code, "first_touch")


def child(code: str) -> str:
    return str(fresh.run(code)["out"])


@pytest.mark.parametrize("way", WAYS)
class TestUnderACpuOwner:
    def test_opening_cuda_is_recorded_with_its_line(self, way):
        code = f"with devguard.guard('cpu', mode='observe'):\n    pass\n    {WAYS[way]}\n    {WAYS[way]}\n"
        (stray,) = strays(code)
        assert (stray["source"], stray["owner"], stray["action"], stray["count"]) == ("cuda", "cpu", "observed", 1)
        assert (stray["site"]["file"], stray["site"]["line"]) == ("<string>", 3)

    def test_error_mode_refuses_before_cuda_is_initialised(self, way):
        code = (
            "with devguard.guard('cpu', mode='error'):\n"
            f"    try: {WAYS[way]}\n"
            "    except devguard.StrayDeviceError as error: print('owns cpu' in str(error))\n"
            "from devguard.support import accelerator\n"
            "print(ctx(), torch.cuda.is_initialized(), accelerator.driver_is_initialized())\n"
            "with devguard.guard(1): print(torch.ones(1, device='cuda').device, ctx())"
        )
        assert child(code).splitlines() == ["True", "[] False False", "cuda:1 [1]"]


ACTIVATED = """
import os
os.environ.update(DEVGUARD="{mode}", DEVGUARD_DEVICE="cpu")
from devguard.activation.activate import activate
activate()
"""
CPU_OWNERS = {
    "by the environment": ACTIVATED,
    "by install": "devguard.install('cpu', '{mode}')\n",
    "by a guard": "devguard.guard('cpu', '{mode}').__enter__()\n",
}
ENTRIES = {
    "index": "with devguard.guard(1): work()",
    "name": "with devguard.guard('cuda:1'): work()",
    "remap": "with devguard.remap(1): work()",
    "again": "scope = devguard.guard(1)\nwith scope, scope: work()",
    "inside a cpu guard": "with devguard.guard('cpu'), devguard.guard(1): work()",
    "without claims": "import os; os.environ['DEVGUARD_RANK_LOCK'] = 'off'\nwith devguard.guard(1): work()",
    "without the door visibility": "with devguard.guard(1, doors={'visibility': 'off'}): work()",
    "function": "devguard.guard(1)(work)()",
    "argument": "devguard.guard(argument='gpu')(lambda gpu: work())(1)",
    "bound function": "devguard.guard(1).bind(work)()",
    "generator": "@devguard.guard(1)\ndef steps(): yield work()\nlist(steps())",
    "coroutine": "@devguard.guard(1)\nasync def main(): work()\nasyncio.run(main())",
    "run": "async def main(): work()\nasyncio.run(devguard.guard(1).run(main()))",
    "thread": "def body():\n with devguard.guard(1): work()\nt = threading.Thread(target=body); t.start(); t.join()",
    "pool": "ThreadPoolExecutor(1).submit(devguard.guard(1)(work)).result()",
}
WORK = """
import asyncio, threading
from concurrent.futures import ThreadPoolExecutor
def work(): print(torch.ones(1, device='cuda').device)
"""


@pytest.mark.parametrize(
    ("owner", "mode"),
    [("by the environment", "warn"), ("by the environment", "repair"), *((owner, "error") for owner in CPU_OWNERS)],
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_entering_a_gpu_is_no_stray_of_a_cpu_owner(entry, owner, mode):
    code = f"{WORK}{CPU_OWNERS[owner].format(mode=mode)}{ENTRIES[entry]}\nprint(ctx())"
    answer = fresh.run(code)
    assert answer["out"].splitlines() == ["cuda:1", "[1]"]
    assert answer["strays"] == []


@pytest.mark.parametrize("owner", ["by the environment", "by install"])
def test_installing_a_gpu_is_no_stray_of_the_cpu_owner_before(owner):
    code = f"{WORK}{CPU_OWNERS[owner].format(mode='error')}devguard.install('cuda:1', 'error'); work(); print(ctx())"
    answer = fresh.run(code)
    assert answer["out"].splitlines() == ["cuda:1", "[1]"]
    assert answer["strays"] == []


@pytest.mark.parametrize("owner", CPU_OWNERS)
def test_the_cpu_owner_is_in_force_again_where_the_entry_failed(owner):
    code = (
        f"{CPU_OWNERS[owner].format(mode='error')}"
        "try: devguard.guard(9).__enter__()\n"
        "except devguard.DeviceResolutionError as error: print('names cuda:9' in str(error))\n"
        "try: torch.ones(1, device='cuda')\n"
        "except devguard.StrayDeviceError as error: print(str(error)[:12])\n"
        "print(ctx())"
    )
    assert child(code).splitlines() == ["True", "first_touch:", "[]"]


class TestModes:
    def test_a_closed_door_records_nothing(self):
        assert strays(f"with devguard.guard('cpu'):\n    devguard.uninstall()\n    {TOUCH}") == []

    def test_repair_only_records(self):
        (stray,) = strays(f"with devguard.guard('cpu'):\n    {TOUCH}")
        assert stray["action"] == "observed"

    def test_warn_warns(self):
        code = (
            "import warnings\n"
            "with warnings.catch_warnings(record=True) as seen, devguard.guard('cpu', mode='warn'):\n"
            f"    warnings.simplefilter('always'); {TOUCH}"
            "print([w.category.__name__ for w in seen])"
        )
        assert child(code) == "['StrayDeviceWarning']"

    @pytest.mark.parametrize(
        "scope",
        ["devguard.guard('cpu', mode='off')", "devguard.guard('cpu', doors={'first_touch': 'off'})",
         "devguard.guard('cpu'), devguard.unguarded()", "devguard.guard(0)", "devguard.guard(1)"],
    )  # fmt: skip
    def test_opening_cuda_is_no_stray_if_the_door_is_off_or_unguarded_or_a_gpu_is_owned(self, scope):
        assert strays(f"with {scope}:\n    {TOUCH}") == []

    def test_opening_an_allowed_device_is_no_stray(self):
        assert strays(f"devguard.allow('cuda:0')\nwith devguard.guard('cpu', mode='error'):\n    {TOUCH}") == []

    def test_the_owner_of_the_process_applies_outside_every_scope(self):
        (stray,) = strays(f"devguard.install('observe', 'cpu')\n{TOUCH}")
        assert stray["owner"] == "cpu"

    def test_calls_that_do_not_initialise_cuda_are_no_strays(self):
        code = (
            "with devguard.guard('cpu', mode='error'):\n"
            "    torch.cuda.is_available(), torch.cuda.device_count(), devguard.status(), devguard.contexts()\n"
        )
        assert strays(code) == []


class TestBeforeTheOwnerWasKnown:
    def test_a_context_on_another_device_is_recorded_with_the_line_that_opened_it(self):
        (stray,) = strays(f"{WATCH}{TOUCH}with devguard.guard(1):\n    pass\nwith devguard.guard(2): pass")
        assert (stray["source"], stray["owner"], stray["action"]) == ("cuda:0", "cuda:1", "observed")
        assert stray["site"]["line"] == 2

    def test_install_records_an_earlier_context_too(self):
        (stray,) = strays(f"{WATCH}{TOUCH}devguard.install('observe', 1)")
        assert stray["source"] == "cuda:0"

    @pytest.mark.parametrize(
        "before",
        [
            "torch.cuda.set_device(1); torch.ones(1, device='cuda')",
            "torch.cuda.init()",
            "torch.cuda.is_available()",
            "with devguard.unguarded(): torch.ones(1, device='cuda')",
            "devguard.allow('cuda:0'); torch.ones(1, device='cuda')",
        ],
    )
    def test_earlier_calls_are_no_strays_if_they_opened_no_other_context_or_it_was_permitted(self, before):
        assert strays(f"{WATCH}{before}\nwith devguard.guard(1, mode='error'):\n    pass") == []

    @pytest.mark.parametrize(("modules", "expected"), [("__main__", 0), ("offload.*", 1)])
    def test_allow_by_module_applies_to_the_module_that_opened_the_context(self, modules, expected):
        later = "exec('with devguard.guard(1): pass', {'__name__': 'other', 'devguard': devguard})"
        assert len(strays(f"{WATCH}{TOUCH}devguard.allow('cuda:0', modules={modules!r})\n{later}")) == expected

    def test_off_records_nothing(self):
        assert strays(f"{WATCH}{TOUCH}with devguard.guard(1, doors={{'first_touch': 'off'}}):\n    pass") == []

    def test_contexts_of_several_owners_are_no_strays(self):
        assert strays("with devguard.guard(0): pass\nwith devguard.guard(1): pass") == []


class TestStatus:
    def test_the_status_names_the_line_that_initialised_cuda(self):
        code = f"with devguard.guard(1):\n    {TOUCH}print(json.dumps(devguard.status()['doors']['first_touch']))"
        row = json.loads(child(code))
        assert row["first"]["site"] == "<string>:1 in <module>"  # entering the guard initialised CUDA
        assert row["first"]["thread"] == "MainThread"
        assert not row["before_the_door_opened"]

    def test_the_status_reports_that_cuda_was_initialised_before_the_door_opened(self):
        torch.ones(1, device="cuda:0")
        with guard(1):
            row = devguard.status()["doors"]["first_touch"]
        assert row["before_the_door_opened"]
        assert "cuda:0" in row["contexts_before"]
        assert devguard.strays() == ()


class TestInstalling:
    def test_uninstall_restores_exactly(self):
        found = vars(torch._C)["_cuda_init"]
        table.open_all()
        assert vars(torch._C)["_cuda_init"] is not found
        assert devguard.uninstall() == []
        assert vars(torch._C)["_cuda_init"] is found

    def test_a_torch_without_the_function_is_a_problem_in_the_status(self, monkeypatch):
        monkeypatch.delattr(torch._C, "_cuda_init")
        table.open_all()
        assert "cannot watch torch._C._cuda_init: " in devguard.status()["doors"]["first_touch"]["problem"]

    def test_a_build_without_cuda_has_nothing_to_watch(self, monkeypatch):
        monkeypatch.delattr(torch._C, "_cuda_init")
        monkeypatch.delattr(torch._C, "_cuda_getDeviceCount")
        first_touch.install()
        assert first_touch.uninstall() == []
        assert accelerator.contexts() is not None
