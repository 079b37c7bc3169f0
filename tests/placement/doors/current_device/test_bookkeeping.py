"""The door ``bookkeeping`` on simulated GPUs: the device of calls that name none, and the contexts they open."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors.current_device import bookkeeping
from tests.helpers.programs import run_child

PRELUDE = """
import threading, torch, devguard
from devguard.reporting.journal import journal
ctx = lambda: [d.index for d in devguard.contexts()]
rows = lambda: [(s.door, s.source, s.target, s.action, s.count) for s in journal.strays()]
def fresh(work):
    # Runs on a thread that has chosen no device: `_thread` does not pass the door `threads`.
    import _thread
    out, done = [], _thread.allocate_lock()
    def run():
        try: out.append(work())
        except devguard.StrayDeviceError as error: out.append(str(error))
        finally: done.release()
    done.acquire(); _thread.start_new_thread(run, ()); done.acquire()
    return out[0]
"""

OPENING = [
    "torch.cuda.synchronize()",
    "torch.cuda.synchronize(None)",
    "torch.cuda.synchronize('cuda')",
    "torch.cuda.empty_cache()",
    "torch.cuda.memory.empty_cache()",
    "torch.cuda.mem_get_info()",
    "torch.cuda.mem_get_info(device=torch.device('cuda'))",
    "torch.cuda.memory.mem_get_info()",
    "torch.accelerator.synchronize()",
] + [f"torch.accelerator.{name}()" for name in ("empty_cache", "get_memory_info") if hasattr(torch.accelerator, name)]
COUNTING = [
    "torch.cuda.memory_allocated()",
    "torch.cuda.max_memory_reserved()",
    "torch.cuda.memory_stats()['allocated_bytes.all.current']",
    "torch.cuda.memory_summary(abbreviated=True)",
]


def child(code: str) -> str:
    """Run `code` in a fresh process."""
    return run_child(code, prelude=PRELUDE)


class TestOnAThreadThatChoseNoDevice:
    def test_unguarded_each_call_opens_device_0(self):
        code = (  # forks a child for each call, before CUDA is initialised
            "import os, sys\n"
            f"for call in {OPENING!r}:\n"
            "    if not os.fork():\n"
            "        torch.cuda.set_device(1); torch.empty(1, device='cuda:1')\n"
            "        fresh(lambda: eval(call)); print(ctx(), call, flush=True); os._exit(0)\n"
            "    os.wait()"
        )
        assert child(code).splitlines() == [f"[0, 1] {call}" for call in OPENING]

    def test_guarded_no_call_opens_device_0(self):
        code = "devguard.install(device=1); torch.empty(1, device='cuda:1')\n"
        code += "".join(f"fresh(lambda: {call}); assert ctx() == [1], {call!r}\n" for call in OPENING + COUNTING)
        code += "print(sum(s[-1] for s in rows()), {s[:-1] for s in rows()})"
        expected = ("bookkeeping", "cuda:0", "cuda:1", "repaired")
        assert child(code) == f"{len(OPENING + COUNTING)} {{{expected!r}}}"

    def test_guarded_calls_return_the_owners_values(self):
        code = (
            "devguard.install(device=1); keep = torch.empty(1 << 20, dtype=torch.uint8, device='cuda:1')\n"
            "assert fresh(lambda: torch.cuda.memory_allocated()) == torch.cuda.memory_allocated(1) > 0\n"
            "assert fresh(lambda: torch.cuda.mem_get_info()) == torch.cuda.mem_get_info(1)\n"
            "assert fresh(lambda: torch.cuda.mem_get_info()) != torch.cuda.mem_get_info(2)\n"
            "assert fresh(lambda: torch.cuda.memory_summary()) == torch.cuda.memory_summary(1)\n"
            "fresh(lambda: torch.cuda.set_per_process_memory_fraction(0.5))\n"
            "assert fresh(lambda: torch.cuda.get_per_process_memory_fraction()) == 0.5\n"
            "assert torch.cuda.get_per_process_memory_fraction(1) == 0.5\n"
            "assert torch.cuda.get_per_process_memory_fraction(2) == 1\n"
            "del keep; fresh(lambda: torch.cuda.empty_cache()); assert torch.cuda.memory_reserved(1) == 0\n"
            "fresh(lambda: torch.cuda.reset_peak_memory_stats()); print(torch.cuda.max_memory_allocated(1), ctx())"
        )
        if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
            code = "\n".join(line for line in code.splitlines() if "fraction" not in line)
        # mem_get_info(2) opens cuda:2, because the program named it
        assert child(code) in ("0 [1, 2]", "0 [1]")

    def test_error_refuses_and_the_other_modes_open_device_0(self):
        code = (
            "devguard.install(device=1, mode='error')\n"
            "print(fresh(lambda: torch.cuda.synchronize()), ctx())\n"
            "print(fresh(lambda: torch.cuda.memory_allocated()), ctx())\n"
        )
        lines = child(code).splitlines()
        assert all("bookkeeping" in line and "owns cuda:1" in line and line.endswith("[1]") for line in lines)
        for mode, action in (("observe", "observed"), ("warn", "warned")):
            code = (
                "import warnings; warnings.simplefilter('ignore')\n"
                f"devguard.install(device=1, mode={mode!r})\n"
                "fresh(lambda: torch.cuda.memory_allocated()); fresh(lambda: torch.cuda.synchronize())\n"
                "fresh(lambda: torch.cuda.synchronize())\n"  # device 0 has a context now: no stray
                "print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
            )
            one = ("bookkeeping", "cuda:0", "cuda:0", action, 1)
            assert child(code) == f"[0, 1] {[one, one]}" or child(code) == f"[0, 1] {[(*one[:-1], 2)]}"
        code = (
            "devguard.install(device=1, mode='off'); fresh(lambda: torch.cuda.synchronize()); print(ctx(), rows())\n"
            "devguard.uninstall()"
        )
        assert child(code) == "[0, 1] []"

    def test_a_named_device_is_used(self):
        code = (
            "devguard.install(device=1)\n"
            "fresh(lambda: torch.cuda.mem_get_info(2)); fresh(lambda: torch.cuda.synchronize(torch.device('cuda:3')))\n"
            "fresh(lambda: torch.cuda.synchronize(device=0))\n"
            "print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "[0, 1, 2, 3] []"

    def test_unguarded_and_allowed_devices_are_left_alone(self):
        code = (
            "devguard.install(device=1)\n"
            "def work():\n"
            "    with devguard.unguarded(): torch.cuda.synchronize()\n"
            "fresh(work); print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "[0, 1] []"
        code = (
            "devguard.install(device=1); devguard.allow('cuda:0')\n"
            "fresh(lambda: torch.cuda.synchronize()); print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "[0, 1] []"


class TestTheCpuOwner:
    def test_before_cuda_is_initialised_calls_do_nothing(self):
        code = (
            "with devguard.guard('cpu'):\n"
            "    torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.memory_allocated()\n"
            "    print(ctx(), torch.cuda.is_initialized(), rows())"
        )
        assert child(code) == f"[] False {[('bookkeeping', 'cuda:0', 'cpu', 'repaired', 1)]}"

    def test_empty_cache_frees_the_memory_of_an_open_device(self):
        code = (
            "torch.cuda.set_device(2); torch.empty(1 << 20, device='cuda:2')\n"
            "def work():\n"
            "    with devguard.guard('cpu'): torch.cuda.empty_cache(); torch.cuda.synchronize()\n"
            "assert torch.cuda.memory_reserved(2) > 0\n"
            "fresh(work); print(ctx(), torch.cuda.memory_reserved(2))"
        )
        assert child(code) == "[2] 0"

    def test_a_memory_query_is_recorded_or_refused(self):
        code = (
            "with devguard.guard('cpu', mode='error'):\n"
            "    try: torch.cuda.mem_get_info()\n"
            "    except devguard.StrayDeviceError: print(torch.cuda.is_initialized())\n"
            "with devguard.guard('cpu'): torch.cuda.mem_get_info()\n"
            "print([s[3] for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "False\n['refused', 'observed']"

    def test_a_forked_child_still_gets_torchs_own_error(self):
        code = (
            "import os, sys\n"
            "devguard.install(device=1); torch.empty(1, device='cuda')\n"
            "pid = os.fork()\n"
            "if not pid:\n"
            "    for scope in (devguard.unguarded(), devguard.guard('cpu')):\n"
            "        with scope:\n"
            "            try: torch.cuda.synchronize()\n"
            "            except RuntimeError as error: print('re-initialize' in str(error), flush=True)\n"
            "    os._exit(0)\n"
            "os.waitpid(pid, 0)"
        )
        assert child(code) == "True\nTrue"


class TestADeviceThatTheProgramChose:
    @pytest.mark.parametrize("how", ["guard", "install"])
    def test_inside_with_device_calls_mean_that_device(self, how):
        # In a fresh process, so that device 2 has no context before.
        code = (
            "def work():\n"
            "    with torch.cuda.device(2):\n"
            "        info = torch.cuda.mem_get_info(); stream = torch.cuda.current_stream()\n"
            "        torch.cuda.synchronize(); torch.cuda.empty_cache()\n"
            "        print(ctx(), stream.device, torch.cuda.current_device())\n"
        )
        if how == "guard":
            code += "with devguard.guard(1): work()\n"
        else:
            code += "devguard.install(device=1); fresh(work)\n"
        code += "print([s for s in rows() if s[0] == 'bookkeeping'])"
        assert child(code) == "[1, 2] cuda:2 2\n[]"

    def test_inside_with_device_synchronize_waits_for_that_device_and_not_for_the_owner(self, monkeypatch):
        # Redirected to the owner, synchronize() would return while the copy to cuda:2 still runs.
        waited = []
        original = torch._C._cuda_synchronize
        monkeypatch.setattr(
            torch._C, "_cuda_synchronize", lambda: (waited.append(torch.cuda.current_device()), original())
        )
        with guard(1):
            with torch.cuda.device(2):
                torch.ones(8).to("cuda:2", non_blocking=True)
                torch.cuda.synchronize()
            torch.cuda.synchronize()
            torch.cuda.synchronize(3)
        devguard.uninstall()  # a door watches this function, too, and must close before the stand-in goes
        monkeypatch.undo()
        assert waited == [2, 1, 3]

    def test_with_device_0_inside_a_guard_is_used_even_without_a_context(self):
        code = (
            "def work():\n"
            "    with devguard.guard(1): pass\n"
            "    with devguard.guard(1), torch.cuda.device(0):\n"
            "        torch.cuda.synchronize(); print(torch.cuda.current_device())\n"
            "fresh(work); print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "0\n[0, 1] []"

    def test_device_0_is_used_if_it_has_a_context(self):
        code = (
            "torch.empty(1, device='cuda:0'); devguard.install(device=1)\n"
            "assert fresh(lambda: torch.cuda.memory_allocated()) == torch.cuda.memory_allocated(0)\n"
            "fresh(lambda: torch.cuda.synchronize()); print([s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "[]"


class TestWellBehavedPrograms:
    def test_nothing_is_recorded_on_the_owner(self):
        devguard.install(device=1)
        with guard(1, mode="error"), devguard.no_strays():
            for call in OPENING + COUNTING:
                eval(call)
        with guard("cuda:0", mode="error"), devguard.no_strays():
            torch.cuda.synchronize()
        threads = [threading.Thread(target=guard(i, mode="error").bind(torch.cuda.synchronize)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert devguard.strays() == ()

    def test_signatures_and_names_are_torchs(self):
        before = {name: getattr(torch.cuda, name) for name in ("synchronize", "mem_get_info", "empty_cache")}
        with guard(1):
            for name, original in before.items():
                ours = getattr(torch.cuda, name)
                assert ours is not original
                assert (ours.__module__, ours.__qualname__) == (original.__module__, original.__qualname__)
                assert inspect.signature(ours) == inspect.signature(original)
                assert getattr(torch.cuda.memory, name, ours) is ours
            with pytest.raises(TypeError):
                torch.cuda.synchronize(1, 2, 3)

    @pytest.mark.parametrize("backend", ["eager"])
    def test_torch_compile_runs_the_same(self, backend):
        def step(x: torch.Tensor) -> torch.Tensor:
            y = x.reshape(2, 4)
            torch.cuda.synchronize()
            return y.reshape(-1)

        with guard(1):
            compiled: Callable[..., Any] = torch.compile(step, backend=backend)
            assert compiled(torch.zeros(8)).shape == (8,)


def test_uninstall_restores_exactly_the_originals():
    modules = [
        torch.cuda,
        torch.cuda.memory,
        torch.accelerator,
        getattr(torch.accelerator, "memory", torch.accelerator),
    ]
    before = [dict(vars(module)) for module in modules]
    with guard(1):
        assert "torch.cuda.synchronize" in bookkeeping.status()["watched"]
        assert bookkeeping.status()["early_copies"] == []
    assert devguard.uninstall() == []
    assert [dict(vars(module)) for module in modules] == before


def test_a_torch_without_the_function_is_a_problem_in_the_status(monkeypatch):
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    with guard(1):
        row = devguard.status()["doors"]["bookkeeping"]
    assert not row["open"]
    assert "cannot watch torch.cuda.mem_get_info: torch" in row["problem"]
