"""The door ``bookkeeping`` on real devices: who answers where no device is named, and which contexts that opens."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import devguard
from devguard import guard
from devguard.doors.current_device import bookkeeping
from tests.helpers.simulated import ROOT

PRELUDE = """
import threading, torch, devguard
from devguard.reporting.journal import journal
ctx = lambda: [d.index for d in devguard.contexts()]
rows = lambda: [(s.door, s.source, s.target, s.action, s.count) for s in journal.strays()]
def fresh(work):
    # on a thread that has chosen no device, below every door that gives a thread its starter's
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
    """Run `code` in a fresh process on the same simulated GPUs."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


class TestOnAThreadThatChoseNoDevice:
    def test_unguarded_each_call_opens_device_0(self):
        code = (  # a child for each, forked before CUDA is touched
            "import os, sys\n"
            f"for call in {OPENING!r}:\n"
            "    if not os.fork():\n"
            "        torch.cuda.set_device(1); torch.empty(1, device='cuda:1')\n"
            "        fresh(lambda: eval(call)); print(ctx(), call, flush=True); os._exit(0)\n"
            "    os.wait()"
        )
        assert child(code).splitlines() == [f"[0, 1] {call}" for call in OPENING]

    def test_guarded_no_call_does(self):
        code = "devguard.install(device=1); torch.empty(1, device='cuda:1')\n"
        code += "".join(f"fresh(lambda: {call}); assert ctx() == [1], {call!r}\n" for call in OPENING + COUNTING)
        code += "print(sum(s[-1] for s in rows()), {s[:-1] for s in rows()})"
        expected = ("bookkeeping", "cuda:0", "cuda:1", "repaired")
        assert child(code) == f"{len(OPENING + COUNTING)} {{{expected!r}}}"

    def test_the_answers_are_the_owners(self):
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
        # asking cuda:2 for its free memory opens it: the program named it
        assert child(code) in ("0 [1, 2]", "0 [1]")

    def test_the_other_modes(self):
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
                "fresh(lambda: torch.cuda.synchronize())\n"  # device 0 is open now: nothing can stray there any more
                "print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
            )
            one = ("bookkeeping", "cuda:0", "cuda:0", action, 1)
            assert child(code) == f"[0, 1] {[one, one]}" or child(code) == f"[0, 1] {[(*one[:-1], 2)]}"
        code = (
            "devguard.install(device=1, mode='off'); fresh(lambda: torch.cuda.synchronize()); print(ctx(), rows())\n"
            "devguard.uninstall()"
        )
        assert child(code) == "[0, 1] []"

    def test_a_device_that_is_named_is_obeyed(self):
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
    def test_neither_waits_nor_frees(self):
        code = (
            "with devguard.guard('cpu'):\n"
            "    torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.memory_allocated()\n"
            "    print(ctx(), torch.cuda.is_initialized(), rows())"
        )
        assert child(code) == f"[] False {[('bookkeeping', 'cuda:0', 'cpu', 'repaired', 1)]}"

    def test_frees_the_memory_of_a_device_that_is_open(self):
        code = (
            "torch.cuda.set_device(2); torch.empty(1 << 20, device='cuda:2')\n"
            "def work():\n"
            "    with devguard.guard('cpu'): torch.cuda.empty_cache(); torch.cuda.synchronize()\n"
            "assert torch.cuda.memory_reserved(2) > 0\n"
            "fresh(work); print(ctx(), torch.cuda.memory_reserved(2))"
        )
        assert child(code) == "[2] 0"

    def test_a_question_is_let_through_or_refused(self):
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


class TestADeviceThatSomebodyChose:
    @pytest.mark.parametrize("how", ["guard", "install"])
    def test_with_device_answers_for_that_device(self, how):
        # in a fresh process: device 2 holds no context before
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

    def test_synchronize_waits_for_the_device_of_the_with_not_for_the_owner(self, monkeypatch):
        # the race that a blind redirect would make: the launch on cuda:2 would still run while its result is read
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
        assert waited == [2, 1, 3]

    def test_with_device_0_inside_a_guard_is_obeyed_even_where_it_is_closed(self):
        code = (
            "def work():\n"
            "    with devguard.guard(1): pass\n"
            "    with devguard.guard(1), torch.cuda.device(0):\n"
            "        torch.cuda.synchronize(); print(torch.cuda.current_device())\n"
            "fresh(work); print(ctx(), [s for s in rows() if s[0] == 'bookkeeping'])"
        )
        assert child(code) == "0\n[0, 1] []"

    def test_a_device_with_a_context_is_obeyed(self):
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


def test_uninstall_puts_back_exactly_what_was_there():
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


def test_a_torch_without_the_function_is_named(monkeypatch):
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    with guard(1):
        row = devguard.status()["doors"]["bookkeeping"]
    assert not row["open"]
    assert "torch.cuda.mem_get_info is not in torch" in row["problem"]
