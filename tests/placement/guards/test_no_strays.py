"""`no_strays` on simulated GPUs: what happened in the block, and not before it; memory as well as contexts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import fresh

MIB = 1 << 20
BEFORE = "torch.empty(1, device='cuda:0')\n"  # so that the context of GPU 0 is open
GROW = f"torch.empty({16 * MIB}, dtype=torch.uint8, device='cuda:0')"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    fresh.preload("torch._dynamo")  # which torch imports when its history of allocations is read for the first time
    yield
    fresh.stop()


def errors(code: str, prelude: str = "") -> list[str | None]:
    """Run `code`, which calls ``block(function, *scopes)``; return the error of each block, None for no error."""
    helper = """
import contextlib, threading
found = []
def block(function, *scopes):
    with contextlib.ExitStack() as stack:
        for scope in scopes: stack.enter_context(scope)
        try:
            with devguard.no_strays():
                function()
            found.append(None)
        except devguard.StrayDeviceError as error: found.append(str(error))
def grow():
    return {GROW}
""".replace("{GROW}", GROW)
    result: list[str | None] = json.loads(fresh.run(prelude + helper + code + "\nprint(json.dumps(found))")["out"])
    return result


EARLIER = {
    "a context": (BEFORE, ""),
    "memory that stays": (f"kept = {GROW}\n", ""),
    "a context that a guarded block opened": ("", "with devguard.guard(1): torch.empty(4, device='cuda:0')\n"),
    "a guard of the other GPU": ("", "with devguard.guard(0): torch.empty(4, device='cuda')\n"),
    "an unguarded block": ("", "with devguard.guard(1), devguard.unguarded(): torch.empty(4, device='cuda:0')\n"),
    "another block, which raised": ("", "block(grow, devguard.guard(1)); found.pop()\n"),
    "the first touch": ("from devguard.doors import table; table.open_all()\n" + BEFORE, ""),
    "a change of the device by a library": (
        "",
        "library = {'__name__': 'library', 'torch': torch}\nexec('def select(): torch.cuda.set_device(0)', library)\n"
        "scope = devguard.guard(1); scope.__enter__(); library['select']()\n",
    ),
}


@pytest.mark.parametrize(("prelude", "before"), EARLIER.values(), ids=list(EARLIER))
class TestWhatCameBefore:
    def test_an_empty_block_is_not_blamed(self, prelude, before):
        assert errors(f"{before}block(lambda: None, devguard.guard(1))", prelude) == [None]

    def test_a_block_that_enters_the_guard_is_not_blamed(self, prelude, before):
        code = f"{before}def enter():\n    with devguard.guard(1): torch.empty(4, device='cuda')\nblock(enter)"
        assert errors(code, prelude) == [None]

    def test_a_block_that_adds_to_it_is_blamed(self, prelude, before):
        (error,) = errors(f"{before}block(grow, devguard.guard(1))", prelude)
        assert error is not None
        assert "cuda:0" in error
        assert f"{16 * MIB} bytes" in error
        assert "in grow" in error  # the line


RESETS = {
    "accumulated": "torch.cuda.reset_accumulated_memory_stats(0)",
    "both": "torch.cuda.reset_accumulated_memory_stats(0); torch.cuda.reset_peak_memory_stats(0)",
    "peak": "torch.cuda.reset_peak_memory_stats(0)",
}
SMALL = "torch.empty(4, device='cuda:0')"
STATES = {
    "memory in use": f"kept = {GROW}\n",
    "memory was freed": f"x = [{SMALL} for _ in range(9)]; del x\n",
    "only a context": "",
}
ORDERS = {
    "before the reset": "{stray}; {reset}",
    "after the reset": "{reset}; {stray}",
    "between resets": "{reset}; {stray}; {reset}",
    "before the reset, right work after": ("{stray}; {reset}; [torch.empty(4, device='cuda') for _ in range(40)]"),
}


class TestCountersThatTheProgramResets:
    @pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
    @pytest.mark.parametrize("reset", RESETS.values(), ids=list(RESETS))
    @pytest.mark.parametrize("state", STATES.values(), ids=list(STATES))
    def test_a_stray_beside_a_reset_raises_with_its_line(self, state, reset, order):
        before = state + "torch.cuda.synchronize(0)\n"
        work = order.format(stray="torch.empty(40, device='cuda:0')", reset=reset)
        (error,) = errors(f"def work():\n    {work}\nblock(work, devguard.guard(1))", before)
        assert error is not None
        assert error.startswith("1 stray(s)")
        assert "in work" in error

    @pytest.mark.parametrize("reset", RESETS.values(), ids=list(RESETS))
    @pytest.mark.parametrize("state", STATES.values(), ids=list(STATES))
    def test_a_reset_alone_is_no_stray(self, state, reset):
        before = state + "torch.cuda.synchronize(0)\n"
        assert errors(
            f"def work(): {reset}\nblock(work, devguard.guard(1)); block(work, devguard.guard(1))", before
        ) == [
            None,
            None,
        ]

    def test_a_history_of_the_program_is_read_from_the_block_on(self):
        before = (
            "torch.cuda.memory._record_memory_history(max_entries=1000, stacks='python')\n" + STATES["memory in use"]
        )
        (error,) = errors(f"def work(): {SMALL}; {RESETS['accumulated']}\nblock(work, devguard.guard(1))", before)
        assert error is not None
        assert error.startswith("1 stray(s)")
        assert "in work" in error


WAYS = {
    "kept": f"kept = []\ndef work(): kept.append({GROW})\n",
    "freed in the block": f"def work(): {GROW}\n",
    "freed, less than the peak before": f"x = {GROW}; del x\ndef work(): torch.empty(4, device='cuda:0')\n",
    "as much freed as allocated": f"kept = [{GROW}]\ndef work(): kept[0] = None; kept[0] = {GROW}\n",
    "from the cache": f"x = {GROW}; del x\ndef work(): {GROW}\n",
    "counters reset in the block": (
        f"x = {GROW}\ndef work():\n    torch.cuda.reset_accumulated_memory_stats(0)\n"
        "    torch.empty(4, device='cuda:0')\n"
    ),
    "by a copy": "x = torch.ones(4)\ndef work(): x.to('cuda:0')\n",
    "by the allocator's own function": (
        "def work():\n    with torch.cuda.device(0): torch.cuda.caching_allocator_delete("
        "torch.cuda.caching_allocator_alloc(1024))\n"
    ),
    "in a private pool": (
        "pool = torch.cuda.MemPool()\ndef work():\n    with torch.cuda.use_mem_pool(pool, device='cuda:0'): "
        "torch.empty(4, device='cuda:0')\n"
    ),
    "on a thread": f"def work(): t = threading.Thread(target=lambda: {GROW}); t.start(); t.join()\n",
    "on a thread outside every scope": (
        "import _thread\ndef work():\n    done = threading.Lock(); done.acquire()\n"
        f"    def run():\n        {GROW}; done.release()\n    _thread.start_new_thread(run, ()); done.acquire()\n"
    ),
    "beside an unguarded block": (f"def work():\n    {GROW}\n    with devguard.unguarded(): {GROW}\n"),
    "after an unguarded block": f"def work():\n    with devguard.unguarded(): {GROW}\n    {GROW}\n",
    "through a door that was refused before": (
        "import pickle\ndata = pickle.dumps(torch.ones(4).to('cuda:0'))\n"
        "with devguard.guard(1, mode='error'), contextlib.suppress(devguard.StrayDeviceError): pickle.loads(data)\n"
        f"def work(): {GROW}\n"
    ),
    "in nested blocks": (f"def work():\n    with devguard.no_strays(): {GROW}\n"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
class TestMemoryOnAGpuWhoseContextIsOpen:
    def test_the_block_raises(self, way):
        (error,) = errors(f"{way}block(work, devguard.guard(1))", BEFORE)
        assert error is not None
        assert "cuda:0" in error

    def test_a_later_empty_block_does_not(self, way):
        assert errors(f"{way}block(work, devguard.guard(1))\nblock(lambda: None, devguard.guard(1))", BEFORE)[1] is None


def test_a_new_context_is_recorded_once_and_its_memory_with_it():
    (error,) = errors("block(grow, devguard.guard(1))")
    assert error is not None
    assert error.startswith("1 stray(s)")
    assert "in grow" in error


def test_each_line_is_named():
    code = "def first(): torch.empty(4, device='cuda:0')\ndef second(): torch.empty(4, device='cuda:2')\n"
    code += "def third(): torch.empty(4, device='cuda:0')\n"
    (error,) = errors(code + "block(lambda: (first(), second(), third(), first()), devguard.guard(1))", BEFORE)
    assert error is not None
    assert [f"in {name}" in error for name in ("first", "second", "third")] == [True, True, True]


def test_the_line_is_named_if_cuda_is_initialised_in_the_block():
    code = "def work():\n    with devguard.guard(1): grow()\nblock(work)"
    (error,) = errors(code)
    assert error is not None
    assert "in grow" in error


RIGHT = {
    "the owner's GPU": "torch.empty(4, device='cuda')",
    "the CPU": "torch.ones(4)",
    "unguarded": f"with devguard.unguarded(): {GROW}",
    "unguarded within": f"with devguard.unguarded(), devguard.guard(1), devguard.unguarded(): {GROW}",
    "another owner in turn": f"with devguard.guard(0): {GROW}",
    "a thread of another owner": (
        f"@devguard.guard(0)\n    def run(): {GROW}\n    t = threading.Thread(target=run); t.start(); t.join()"
    ),
    "allowed": f"devguard.allow('cuda:0'); {GROW}",
    "freed, of before": "kept.clear()",
    "counters reset": "torch.cuda.reset_accumulated_memory_stats(0); torch.cuda.reset_peak_memory_stats(0)",
}


@pytest.mark.parametrize("way", RIGHT.values(), ids=list(RIGHT))
def test_work_that_does_not_stray_raises_nothing(way):
    code = f"kept = [{GROW}]\ndef work():\n    {way}\nblock(work, devguard.guard(1))"
    assert errors(code, BEFORE) == [None]


def test_a_thread_that_works_on_its_own_gpu_all_the_time_is_not_blamed():
    code = (
        "stop, started = threading.Event(), threading.Event()\n"
        "@devguard.guard(0)\n"
        "def run():\n"
        f"    while not stop.is_set(): {GROW}; started.set()\n"
        "t = threading.Thread(target=run); t.start(); started.wait()\n"
        "block(lambda: torch.empty(4, device='cuda'), devguard.guard(1)); stop.set(); t.join()"
    )
    assert errors(code, BEFORE) == [None]


def test_a_cpu_owner_has_no_memory_on_any_gpu():
    (error,) = errors("block(grow, devguard.guard('cpu', mode='observe'))", BEFORE)
    assert error is not None
    assert "owner cpu" in error


def test_off_and_no_owner_raise_nothing():
    code = "block(grow, devguard.guard(1, mode='off')); block(grow, devguard.guard(1), devguard.unguarded())\n"
    assert errors(code + "devguard.uninstall(); block(grow)", BEFORE) == [None, None, None]


def test_the_blocks_own_exception_wins_and_the_stray_is_recorded():
    code = (
        f"{BEFORE}try:\n    with devguard.guard(1), devguard.no_strays():\n        {GROW}; 1 / 0\n"
        "except ZeroDivisionError: print([(s.source, s.bytes) for s in devguard.strays()])"
    )
    assert fresh.run(code)["out"] == f"[('cuda:0', {16 * MIB})]"


def test_the_exception_of_the_block_survives_a_look_that_fails():
    code = (
        f"{BEFORE}from devguard.support import accelerator\n"
        "def fail(*args): raise RuntimeError('CUDA error')\n"
        "try:\n    with devguard.guard(1), devguard.no_strays():\n"
        "        original, accelerator.contexts = accelerator.contexts, fail\n        1 / 0\n"
        "except ZeroDivisionError: accelerator.contexts = original; print('own', torch._C._cuda_isHistoryEnabled())"
    )
    assert fresh.run(code)["out"] == "own False"


def test_the_state_is_as_before_the_block():
    code = (
        "with devguard.guard(0): pass\n"
        "with devguard.guard(1):\n"
        "    before = devguard.status()['owned']\n"
        "    with devguard.no_strays(), devguard.no_strays(): print(torch._C._cuda_isHistoryEnabled())\n"
        "    print(torch._C._cuda_isHistoryEnabled(), devguard.status()['owned'] == before, before)\n"
        "with devguard.guard(1): pass\n"
        "torch.empty(4, device='cuda:0')\n"
    )
    answer = fresh.run(code)
    assert answer["out"] == "True\nFalse True ['cuda:0', 'cuda:1']"
    assert answer["strays"] == []


def test_a_history_that_the_program_records_goes_on():
    code = (
        "torch.cuda.memory._record_memory_history(max_entries=10)\n"
        "with devguard.guard(1), devguard.no_strays(): pass\n"
        "print(torch._C._cuda_isHistoryEnabled()); torch.cuda.memory._record_memory_history(enabled=None)"
    )
    assert fresh.run(code)["out"] == "True"


def test_an_uninstall_in_the_block_stays_in_force():
    code = (
        "with devguard.guard(0): pass\n"
        "with devguard.no_strays(): devguard.uninstall()\n"
        "with devguard.guard(0): print(devguard.status()['doors']['load']['open'])"
    )
    assert fresh.run(code)["out"] == "True"


def test_a_block_around_a_fork_does_not_raise_in_the_child():
    code = (
        "import os\nwith devguard.guard(1): pass\nblock = devguard.no_strays(); block.__enter__()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    block.__exit__(None, None, None); os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])); block.__exit__(None, None, None)"
    )
    assert fresh.run(code)["out"] == "0"


def test_one_object_serves_several_threads():
    code = (
        "shared, first, second = devguard.no_strays(), threading.Event(), threading.Event()\n"
        "def run():\n"
        "    with devguard.guard(1), shared: first.set(); second.wait()\n"
        "t = threading.Thread(target=run); t.start(); first.wait()\n"
        "try:\n"
        f"    with devguard.guard(1), shared: {GROW}\n"
        "except devguard.StrayDeviceError: found.append('here')\n"
        "with contextlib.suppress(devguard.StrayDeviceError): second.set(); t.join()"
    )
    thread: Any = "import threading\nthreading.excepthook = lambda a: found.append(a.exc_type.__name__)\n"
    assert errors(code, thread + BEFORE) == ["here", "StrayDeviceError"]  # memory is counted for the process


GUESS = """
import os
os.environ["DEVGUARD"] = "repair"
from devguard.activation.activate import activate
activate()
"""


class TestAGuess:
    def test_it_is_settled_first(self):
        (error,) = errors("torch.cuda.set_device(1); block(grow)", GUESS)
        assert error is not None
        assert "in grow" in error
        assert "owner cuda:1" in error

    def test_an_empty_block_is_not_blamed(self):
        assert errors("torch.cuda.set_device(1); block(lambda: None)", GUESS + BEFORE) == [None]

    def test_a_device_selected_in_the_block_is_the_guess(self):
        code = "def work(): torch.cuda.set_device(2); torch.empty(4, device='cuda')\nblock(work)"
        assert errors(f"torch.cuda.set_device(1)\n{code}", GUESS) == [None]


@pytest.mark.parametrize("mode", ["observe", "warn", "repair", "error"])
def test_in_each_mode_the_error_is_the_same_even_if_warnings_are_errors(mode):
    code = "import warnings; warnings.simplefilter('error'); "
    (error,) = errors(code + f"block(grow, devguard.guard(1, mode={mode!r}))", BEFORE)
    assert error is not None
    assert error.startswith("1 stray(s) inside no_strays():")


def test_a_change_of_the_device_that_a_library_left_in_the_block_is_named():
    code = (
        "library = {'__name__': 'library', 'torch': torch}\nexec('def select(): torch.cuda.set_device(0)', library)\n"
        "block(library['select'], devguard.guard(1))"
    )
    (error,) = errors(code)
    assert error is not None
    assert "set_device: cuda:0" in error


def test_an_allocator_that_counts_only_what_is_in_use():
    """``cudaMallocAsync`` counts no allocations and keeps no history."""
    from tests.helpers.programs import run_child

    code = (
        "x = torch.empty(1, device='cuda:0')\n"
        "try:\n"
        "    with devguard.guard(1), devguard.no_strays():\n"
        f"        x = {GROW}\n"
        "except devguard.StrayDeviceError as error: print('cuda:0' in str(error), 'bytes' in str(error))\n"
        "with devguard.guard(1), devguard.no_strays(): pass\n"
        "print(devguard.status()['strays'])"
    )
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    assert run_child(code, environment=environment) == "True True\n1"


ASIDE = """
import warnings
warnings.simplefilter('ignore')
said = []
warnings.showwarning = lambda message, *rest: said.append(str(message))
warnings.simplefilter('always', RuntimeWarning)
go, inside, done = threading.Event(), threading.Event(), threading.Event()
def aside(*, work):
    with devguard.unguarded():
        inside.set(); go.wait(); work(); done.set()
        if not leaves: stop.wait()
    left.set()
stop, left, leaves = threading.Event(), threading.Event(), {leaves}
thread = threading.Thread(target=aside, kwargs={'work': {there}}); thread.start(); inside.wait()
def other():
    go.set(); done.wait()
    if leaves: left.wait()
"""


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves in the block"])
class TestAThreadInsideUnguarded:
    """The counters do not tell which thread allocates: judge the lines of the block, and report the rest."""

    def run(self, work: str, leaves: bool, there: str = "lambda: None") -> tuple[str | None, list[str]]:
        prepare = ASIDE.replace("{leaves}", str(leaves)).replace("{there}", there)
        code = f"{prepare}def work():\n    {work}\nblock(work, devguard.guard(1))\n"
        error, said = errors(code + "stop.set(); thread.join(); found.append(said)", BEFORE)
        return error, said  # type: ignore[return-value]

    @pytest.mark.parametrize("work", [f"{GROW}; other()", "grow(); other()", f"x = {GROW}; other()"])
    def test_a_line_of_the_block_raises(self, leaves, work):
        error, said = self.run(work, leaves)
        assert error is not None
        assert f"{16 * MIB} bytes" in error
        assert said == []

    def test_memory_of_the_other_thread_is_no_stray_and_is_reported(self, leaves):
        error, said = self.run("other()", leaves, "grow")
        assert error is None
        assert len(said) == 1
        assert "did not judge the memory that was allocated on cuda:0" in said[0]

    def test_of_both_the_line_of_the_block_raises(self, leaves):
        error, said = self.run("torch.empty(4, device='cuda:0'); other()", leaves, "grow")
        assert error is not None
        assert "in work" in error
        assert "in grow" not in error
        assert len(said) == 1

    def test_a_third_thread_is_reported(self, leaves):
        error, said = self.run("t = threading.Thread(target=grow); t.start(); t.join(); other()", leaves)
        assert error is None
        assert len(said) == 1

    @pytest.mark.parametrize("work", ["other()", "torch.empty(4, device='cuda'); other()"])
    def test_a_block_that_does_not_stray_is_silent(self, leaves, work):
        assert self.run(work, leaves) == (None, [])
