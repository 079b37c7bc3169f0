"""The door ``native`` on simulated GPUs: contexts that no other door explains, in fresh processes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from devguard.support import installed_torch
from tests.helpers.programs import run_child

SHOW = """
def show():
    print([(s.door, s.source, s.action) for s in devguard.strays() if s.door == 'native'])
"""


def test_a_device_named_by_hand_in_a_decorated_function_is_found_after_the_call():
    code = SHOW + (
        "@devguard.guard(1)\n"
        "def work():\n"
        "    return torch.empty(4, device='cuda:0')\n"
        "x = work()\n"
        "from devguard.reporting.journal import journal\n"
        "print([(s.source, s.action) for s in journal.strays()])\n"
        "note = journal.strays()[0].note\n"
        "print('after work had returned' in note, 'allocator was used' in note)\n"
    )
    assert run_child(code) == "[('cuda:0', 'observed')]\nTrue True"


def test_a_context_of_a_native_thread_is_found_on_request_with_evidence():
    code = SHOW + (
        "import ctypes, threading\n"
        "with devguard.guard(1):\n"
        "    c = ctypes.c_void_p(); d = ctypes.CDLL('libcuda.so.1')\n"
        "    d.cuDevicePrimaryCtxRetain(ctypes.byref(c), 0)\n"
        "show()\n"
        "print('allocator was not used' in devguard.strays()[-1].note)\n"
        "show()\n"
    )
    assert run_child(code) == "[('native', 'cuda:0', 'observed')]\nTrue\n[('native', 'cuda:0', 'observed')]"


def test_memory_from_the_cuda_array_interface_of_another_device_is_found_by_its_context():
    """The door ``interop`` cannot watch ``torch.as_tensor``; docs/doors.md gives the reason."""
    code = SHOW + (
        "class Array:\n"
        "    def __init__(self):\n"
        "        with torch.cuda.device(0): self.memory = torch.cuda.caching_allocator_alloc(16)\n"
        "        self.__cuda_array_interface__ = {\n"
        "            'shape': (4,), 'typestr': '<f4', 'data': (self.memory, False), 'version': 2}\n"
        "@devguard.guard(1)\n"
        "def work(): return torch.as_tensor(Array(), device='cuda:0')\n"
        "import sys; line = sys._getframe().f_lineno; x = work(); print(x.device)\n"
        "show(); print(devguard.strays()[-1].site.line == line)"
    )
    assert run_child(code) == "cuda:0\n[('native', 'cuda:0', 'observed')]\nTrue"


def test_no_strays_raises_for_an_unexplained_context():
    code = (
        "try:\n"
        "    with devguard.guard(1), devguard.no_strays():\n"
        "        torch.empty(4, device='cuda:0')\n"
        "except devguard.StrayDeviceError as error: print('native: cuda:0' in str(error))\n"
    )
    assert run_child(code) == "True"


@pytest.mark.parametrize(
    "code",
    [
        "with devguard.guard(1): torch.empty(4, device='cuda')\n",
        "with devguard.guard(1):\n    with devguard.unguarded(): torch.empty(4, device='cuda:0')\n",
        "devguard.allow('cuda:0')\nwith devguard.guard(1): torch.empty(4, device='cuda:0')\n",
        "devguard.allow('cuda:0', modules='offload')\nwith devguard.guard(1): torch.empty(4, device='cuda:0')\n",
        "with devguard.guard(1, mode='off'):\n    torch.empty(4, device='cuda:0')\n    devguard.strays()\n",
        "torch.empty(4, device='cuda:0')\nwith devguard.guard(1): torch.empty(4, device='cuda')\n",
        "with devguard.guard(1): pass\nwith devguard.guard(0): torch.empty(4, device='cuda')\n",
        "torch.empty(4, device='cuda:0')\n",
    ],
    ids=[
        "owner only",
        "unguarded",
        "allowed",
        "allowed to some",
        "off",
        "there before",
        "owned in turn",
        "no guard at all",
    ],
)
def test_a_context_that_is_owned_allowed_or_older_is_no_stray(code):
    assert run_child(SHOW + code + "show()") == "[]"


def test_a_stray_of_another_door_explains_its_context():
    code = SHOW + (
        "with devguard.guard(1, mode='observe'): pickle.loads(data)\nshow()\nprint([s.door for s in devguard.strays()])"
    )
    assert run_child(code, pickle.dumps(torch.ones(4).to("cuda:0"))) == "[]\n['load']"


def test_a_closed_door_records_nothing():
    code = SHOW + "with devguard.guard(1):\n    devguard.uninstall()\n    torch.empty(4, device='cuda:0')\nshow()"
    assert run_child(code) == "[]"


@pytest.mark.parametrize("mode", ["warn", "error"])
def test_torchs_own_check_of_contexts_follows_the_process_mode_where_torch_has_one(mode):
    code = (
        "import os\n"
        "name = 'TORCH_CUDA_CHECK_STRAY_CONTEXT'\n"
        f"devguard.install(mode={mode!r}, device=1)\n"
        "has = hasattr(torch.cuda, '_check_stray_context')\n"
        "with devguard.guard(0), devguard.guard(1): pass\n"  # devguard's own exchanges must not fail the check
        f"print(os.environ.get(name) == ({mode!r} if has else None))\n"
        "devguard.uninstall()\n"
        "print(name in os.environ)\n"
        f"os.environ[name] = 'off'; devguard.install(mode={mode!r}, device=1); print(os.environ[name])\n"
    )
    assert run_child(code) == "True\nFalse\noff"


def test_accepted_contexts_are_no_strays():
    code = SHOW + (
        "from devguard.doors import table\n"
        "with devguard.guard(1):\n"
        "    torch.empty(4, device='cuda:0')\n"
        "    table.accept_contexts()\n"
        "    torch.empty(4, device='cuda:2')\n"
        "show()\n"
    )
    assert run_child(code) == "[('native', 'cuda:2', 'observed')]"


def test_with_torchs_allocation_history_the_stray_has_its_line_and_bytes():
    code = (
        "from devguard.support import allocation_history\n"
        "with devguard.guard(1):\n"
        "    allocation_history.record()\n"
        "    def first(): return torch.empty(4, device='cuda:0')\n"
        "    def second(): return torch.empty(4, device='cuda:0')\n"
        "    x, y = first(), second()\n"
        "print([(s.site.function, s.bytes) for s in devguard.strays()])\n"
    )
    assert run_child(code) == "[('first', 32)]"


def test_forget_past_owners_keeps_only_owners_in_force():
    code = SHOW + (
        "from devguard.ownership.process import forget_past_owners\n"
        "with devguard.guard(0): pass\n"
        "with devguard.guard(1):\n"
        "    print(devguard.status()['owned'])\n"
        "    forget_past_owners()\n"
        "    print(devguard.status()['owned'])\n"
        "show()\n"
        "with devguard.guard(0) as device: print(device)\n"
    )
    lines = run_child(code).splitlines()
    assert lines == ["['cuda:0', 'cuda:1']", "['cuda:1']", "[('native', 'cuda:0', 'observed')]", "cuda:0"]


KINDS = {
    "coroutine": "@devguard.guard(1)\nasync def work(): return there()\nasyncio.run(work())\n",
    "coroutine that fails": (
        "@devguard.guard(1)\nasync def work(): there(); 1 / 0\n"
        "with contextlib.suppress(ZeroDivisionError): asyncio.run(work())\n"
    ),
    "generator": "@devguard.guard(1)\ndef work(): yield there()\nlist(work())\n",
    "generator that is closed": "@devguard.guard(1)\ndef work(): yield there()\nx = work(); next(x); x.close()\n",
    "asynchronous generator": (
        "@devguard.guard(1)\nasync def work(): yield there()\n"
        "async def main():\n    async for _ in work(): pass\nasyncio.run(main())\n"
    ),
    "asynchronous generator that is closed": (
        "@devguard.guard(1)\nasync def work(): yield there()\n"
        "async def main():\n    x = work(); await anext(x); await x.aclose()\nasyncio.run(main())\n"
    ),
}


@pytest.mark.parametrize("code", KINDS.values(), ids=list(KINDS))
def test_the_end_of_a_decorated_coroutine_or_generator_is_a_time_to_look(code):
    start = "import asyncio, contextlib\ndef there(): return torch.empty(4, device='cuda:0')\n"
    end = (
        "from devguard.reporting.journal import journal\n"
        "print([(s.source, 'after work had returned' in s.note) for s in journal.strays()])"
    )
    assert run_child(start + code + end) == "[('cuda:0', True)]"


def test_the_end_of_the_process_is_a_time_to_look():
    code = (
        "import atexit\n"
        "from devguard.reporting.journal import journal\n"
        "atexit.register(lambda: print([(s.source, s.note.partition(';')[0]) for s in journal.strays()]))\n"
        "with devguard.guard(1): torch.empty(4, device='cuda:0')\n"
    )
    assert run_child(code) == "[('cuda:0', 'found at the end of the process')]"


class TestTheContextsOfACopyBetweenGpus:
    COPY = (
        "devguard.allow('cuda:2')\n"
        "with devguard.guard(1):\n    x = torch.ones(4).to('cuda:1')\n    y = x.to('cuda:2')\n"
    )
    TEXT = "first copy between two GPUs"

    def test_the_records_explain_them(self):
        code = self.COPY + "print([s.source for s in devguard.strays() if 'first copy between two GPUs' in s.note])"
        opens_all = installed_torch.release() >= (2, 11)
        assert run_child(code) == ("['cuda:0', 'cuda:3']" if opens_all else "[]")

    @pytest.mark.skipif(installed_torch.release() < (2, 11), reason="torch opens them from 2.11 on")
    def test_no_strays_and_the_log_explain_them(self, tmp_path):
        code = (
            "try:\n    with devguard.no_strays(): exec(sys.argv[1])\n"
            "except devguard.StrayDeviceError as error: print('first copy between two GPUs' in str(error))\n"
        )
        log = {"DEVGUARD_LOG": str(tmp_path)}
        assert run_child(code, arguments=[self.COPY], environment=log) == "True"
        shown = subprocess.run(
            [sys.executable, "-m", "devguard", "log", str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
        assert self.TEXT in " ".join(shown.split())

    @pytest.mark.parametrize(
        "other",
        [
            "torch.cuda.synchronize(0)",
            "[torch.cuda.synchronize(i) for i in (0, 2, 3)]",
            "x = torch.ones(1).to('cuda:1'); y = torch.ones(1).to('cuda:0')",
        ],
    )
    def test_other_contexts_are_not_explained_so(self, other):
        code = f"with devguard.guard(1): {other}\nx = devguard.strays(); print({self.TEXT!r} in str(x), x != ())"
        assert run_child(code) == "False True"
