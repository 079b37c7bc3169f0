"""First calls that go to C++ without torch's initialisation: under a launcher, and in a process that owns no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard.doors import table
from tests.helpers import fresh

PRELUDE = """
import threading, warnings
from torch.utils.data import DataLoader
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return torch.ones(2)
def load(**options):
    for batch in DataLoader(Data(), batch_size=2, pin_memory=True, **options): pass
def record():
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record(); second.record(); first.elapsed_time(second)
def graph():
    with torch.cuda.graph(torch.cuda.CUDAGraph()): pass
"""
UNINITIALISED = {
    "pin": "torch.ones(4).pin_memory()",
    "pin of a storage": "torch.ones(4).untyped_storage().pin_memory()",
    "pin of a typed storage": "torch.FloatStorage(4).pin_memory()",
    "pin of a sequence": "torch.nn.utils.rnn.pack_sequence([torch.ones(2)]).pin_memory()",
    "pin of a sparse tensor": "torch.ones(2, 2).to_sparse().pin_memory()",
    "pin of a parameter": "torch.nn.Parameter(torch.ones(2)).pin_memory()",
    "loader": "load()",
    "loader on a thread": "(t := threading.Thread(target=load), t.start(), t.join())",
    "graph": "graph()",
    "graph object": "torch.cuda.CUDAGraph()",
    "event": "torch.cuda.Event().record()",
    "event to share": "torch.cuda.Event(interprocess=True).ipc_handle()",
    "events": "record()",
    "accelerator stream": "torch.accelerator.current_stream()",
    "sleep": "torch.cuda._sleep(1)",
    "C stream": "torch._C._cuda_getCurrentStream(0)",
    "C default stream": "torch._C._cuda_getDefaultStream(0)",
    "C synchronize": "torch._C._cuda_synchronize()",
}
OTHERS = {
    "stream": "torch.cuda.Stream()",
    "stream context": "torch.cuda.stream(torch.cuda.Stream()).__enter__()",
    "current stream": "torch.cuda.current_stream().synchronize()",
    "default stream": "torch.cuda.default_stream().synchronize()",
    "loader with workers": "load(num_workers=1)",
    "factory": "torch.zeros(2, device='cuda')",
    "empty": "torch.empty(2, device='cuda')",
    "like": "torch.empty_like(torch.ones(2), device='cuda')",
    "copy": "torch.ones(2).to('cuda')",
    "cuda": "torch.ones(2).cuda()",
    "module": "torch.nn.Linear(1, 1).cuda()",
    "init, then empty": "(torch.cuda.init(), torch.empty(2, device='cuda'))",
    "properties, then empty": "(torch.cuda.get_device_properties(0), torch.empty(2, device='cuda'))",
    "bf16, then pin": "(torch.cuda.is_bf16_supported(), torch.empty(2, pin_memory=True))",
    "generator": "torch.randn(2, device='cuda', generator=torch.Generator(device='cuda').manual_seed(1))"
    " if False else torch.Generator(device='cuda').manual_seed(1)",
    "seed": "torch.cuda.manual_seed(1)",
    "seed state": "torch.cuda.get_rng_state()",
    "host registration": "torch.cuda.cudart().cudaHostRegister(torch.ones(4096).data_ptr(), 16384, 0)",
    "allocator": "torch.cuda.caching_allocator_alloc(16)",
    "memory": "(torch.cuda.memory_allocated(), torch.cuda.mem_get_info(), torch.cuda.memory_stats())",
    "synchronize": "torch.cuda.synchronize()",
    "accelerator": "(torch.accelerator.synchronize(), torch.accelerator.current_device_index())",
    "blas": "torch.cuda.current_blas_handle()",
    "queries": "(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.is_bf16_supported())",
    "dlpack": "torch.from_dlpack(torch.ones(2).cuda())",
}
RANK = """
import os
os.environ.update(DEVGUARD="repair", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
from devguard.activation.activate import activate
activate()
"""
CPU = [name for name in UNINITIALISED if name != "loader on a thread"]


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    yield
    fresh.stop()


def run(code: str) -> Any:
    """Run `code` in a fresh process; return its output, its contexts before ``strays()``, and its strays."""
    answer = fresh.run(f"{PRELUDE}{code}\nprint(json.dumps(ctx()))")
    *lines, contexts = answer["out"].splitlines()
    found = [(stray["door"], stray["source"], stray["action"]) for stray in answer["strays"]]
    return lines, json.loads(contexts), [stray for stray in found if stray[0] != "threads"]


@pytest.mark.parametrize("call", [*UNINITIALISED.values(), *OTHERS.values()], ids=[*UNINITIALISED, *OTHERS])
class TestTheFirstCall:
    def test_of_rank_1_does_not_open_gpu_0(self, call):
        _, contexts, strays = run(f"{RANK}{call}")
        assert 0 not in contexts
        assert strays == []

    def test_under_a_guard_does_not_open_gpu_0(self, call):
        assert run(f"with devguard.guard(1): {call}")[1:] == ([1], [])

    def test_on_a_thread_of_rank_1_does_not_open_gpu_0(self, call):
        _, contexts, strays = run(f"{RANK}def work(): {call}\nt = threading.Thread(target=work); t.start(); t.join()")
        assert (contexts, strays) == ([1], [])


@pytest.mark.parametrize("call", [UNINITIALISED[name] for name in CPU], ids=CPU)
class TestInAProcessThatOwnsNoGpu:
    def test_error_mode_refuses_before_a_context_is_opened(self, call):
        code = (
            f"with devguard.guard('cpu', mode='error'):\n    try: {call}\n"
            "    except devguard.StrayDeviceError as error: print(error)"
        )
        (message,), contexts, strays = run(code)
        assert contexts == []
        assert strays == [("first_touch", "cuda", "refused")]
        assert "owns cpu" in message
        assert "without pin_memory" in message

    @pytest.mark.parametrize("mode", ["observe", "repair"])
    def test_the_line_is_recorded(self, call, mode):
        (stray,) = [
            stray
            for stray in fresh.run(f"{PRELUDE}with devguard.guard('cpu', mode={mode!r}):\n    {call}")["strays"]
            if stray["door"] == "first_touch"
        ]
        assert (stray["source"], stray["owner"], stray["action"]) == ("cuda", "cpu", "observed")
        assert "pin_memory" in stray["note"]
        if not call.startswith(("load", "record", "graph")):
            assert (stray["site"]["file"], stray["site"]["line"]) == ("<string>", PRELUDE.count("\n") + 2)

    def test_off_unguarded_and_allowed_are_left_alone(self, call):
        scopes = "devguard.guard('cpu', mode='off')", "devguard.guard('cpu', mode='error'), devguard.unguarded()"
        for scope in scopes:
            assert [s for s in run(f"with {scope}: {call}")[2] if s[0] == "first_touch"] == []
        assert run(f"devguard.allow('cuda:0')\nwith devguard.guard('cpu', mode='error'): {call}")[2] == []


def test_warn_warns_with_what_to_do():
    code = (
        "with warnings.catch_warnings(record=True) as seen, devguard.guard('cpu', mode='warn'):\n"
        "    warnings.simplefilter('always'); torch.ones(2).pin_memory()\n"
        "print('without pin_memory' in str(seen[0].message))"
    )
    assert run(code)[0] == ["True"]


class TestWhoOpenedIt:
    WATCH = "from devguard.doors import table; table.open_all()\n"

    @pytest.mark.parametrize(
        "touch",
        ["torch.cuda.set_device(1)", "torch.cuda.init()", "torch.cuda.get_device_properties(0)",
         "torch.empty(1, device='cuda:1')", "torch.accelerator.set_device_index(1)"],
    )  # fmt: skip
    @pytest.mark.parametrize(
        "later", ["torch.empty(4, device='cuda:0')", "torch.empty(4, pin_memory=True, device='cpu')"]
    )
    def test_the_line_of_the_first_touch_is_not_blamed_for_a_context_of_a_later_line(self, touch, later):
        code = f"{self.WATCH}{touch}\n{later}\nwith devguard.guard(2): pass\n"
        strays = fresh.run(code)["strays"]
        assert [stray for stray in strays if stray["site"]["line"] == 2 and "cuda:0" in stray["source"]] == []

    @pytest.mark.parametrize("touch", ["torch.cuda.set_device(1)", "torch.empty(1, device='cuda:1')"])
    def test_under_a_launcher_neither(self, touch):
        strays = fresh.run(f"{RANK}{touch}\ntorch.empty(4, device='cuda:0')\n")["strays"]
        line = RANK.count("\n") + 1
        assert [(s["door"], s["source"]) for s in strays] == [("native", "cuda:0")]
        assert strays[0]["site"] is None or strays[0]["site"]["line"] != line

    def test_the_line_that_opened_it_is(self):
        (stray,) = fresh.run(
            f"{self.WATCH}torch.ones(2).pin_memory()\ntorch.cuda.init()\nwith devguard.guard(1): pass"
        )["strays"]
        assert (stray["door"], stray["source"], stray["site"]["line"]) == ("first_touch", "cuda:0", 2)


def test_a_rank_that_chooses_another_device_opens_only_that():
    for choose in ("torch.cuda.set_device(0)", "torch.accelerator.set_device_index(0)", "torch._C._cuda_setDevice(0)"):
        assert run(f"{RANK}{choose}; torch.empty(1, device='cuda')")[1:] == ([0], [])


def test_a_guard_of_another_gpu_than_the_local_rank_opens_only_that():
    for code in ("with devguard.guard(0): pass", "devguard.install(device=0)", "devguard.guard(0)(lambda: 1)()"):
        assert run(f"{RANK}{code}")[1] == [0]


def test_memory_that_is_pinned_by_a_factory_function_is_named_in_the_record():
    code = "@devguard.guard('cpu')\ndef work(): return torch.empty(4, pin_memory=True)\nwork()"
    (stray,) = fresh.run(code)["strays"]
    assert (stray["door"], stray["source"]) == ("native", "cuda:0")
    assert "pinned memory" in stray["note"]


def test_a_process_without_an_owner_works_as_torch_does():
    code = "from devguard.doors import table; table.open_all()\nprint(torch.ones(2).pin_memory().is_pinned())"
    assert run(code) == (["True"], [0], [])


def test_uninstall_restores_exactly():
    names = ("_cuda_getCurrentStream", "_cuda_synchronize")
    found = [vars(torch._C)[name] for name in names], vars(torch.cuda.CUDAGraph)["__new__"]
    assert "pin_memory" not in vars(torch.Tensor)
    table.open_all()
    assert "pin_memory" in vars(torch.Tensor)
    assert devguard.uninstall() == []
    assert "pin_memory" not in vars(torch.Tensor)
    assert ([vars(torch._C)[name] for name in names], vars(torch.cuda.CUDAGraph)["__new__"]) == found
