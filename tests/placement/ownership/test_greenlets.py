"""gevent and eventlet on simulated GPUs: in any order of imports, each greenlet has its own device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

GEVENT = """
import gevent; sleep, spawn, wait = gevent.sleep, gevent.spawn, lambda g: gevent.joinall(g, raise_error=True)
"""
EVENTLET = """
import warnings; warnings.simplefilter("ignore")  # it is deprecated, and says so
import eventlet; sleep, spawn, wait = eventlet.sleep, eventlet.spawn, lambda g: [one.wait() for one in g]
"""
PATCHES = {
    "gevent": GEVENT,
    "gevent, patched": f"from gevent import monkey; monkey.patch_all()\n{GEVENT}",
    "eventlet": EVENTLET,
    "eventlet, patched": f"{EVENTLET}\neventlet.monkey_patch()",
}
ORDERS = {
    "before torch": "{patch}\nimport torch, devguard",
    "after torch": "import torch, devguard\n{patch}",
    "after the first guard": "import torch, devguard\nwith devguard.guard(1): pass\n{patch}",
}
PROGRAM = """
import threading
torch.cuda.set_device(1)

def check(index, owner):
    assert torch.cuda.current_device() == index, (torch.cuda.current_device(), index)
    assert str(devguard.owner()) == owner, (devguard.owner(), owner)
    assert torch.empty(1, device="cuda").device.index == index

def guarded(index):
    check(1, "None")
    with devguard.guard(index):
        for _ in range(5):
            check(index, f"cuda:{index}")
            sleep(0)
        with torch.cuda.device(0):
            sleep(0)
            check(0, f"cuda:{index}")
        check(index, f"cuda:{index}")
    check(1, "None")

@devguard.guard("cuda:2")
def decorated():
    for _ in range(5):
        check(2, "cuda:2")
        sleep(0)

def unguarded():
    for _ in range(5):
        check(1, "None")
        sleep(0)

wait([spawn(guarded, 2), spawn(guarded, 3), spawn(decorated), spawn(unguarded)])
with devguard.guard(3):
    wait([spawn(guarded, 2), spawn(unguarded)])
    check(3, "cuda:3")
    seen = []
    thread = threading.Thread(target=lambda: (sleep(0), check(3, "cuda:3"), seen.append(1)))
    thread.start(); thread.join()
    assert seen == [1]
check(1, "None")
print("done")
"""


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_greenlets_do_not_see_each_others_device(run_simulated: Callable[..., Any], patch: str, order: str) -> None:
    program = order.format(patch=patch) + PROGRAM
    assert run_simulated(program, gpus=4).stdout == "done\n"


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_greenlets_of_a_forked_child_have_their_own_scopes(run_simulated: Callable[..., Any], patch: str) -> None:
    """After the fork CUDA does not work, and torch raises where the current device is asked for."""
    program = f"""
{patch}
import contextlib, os, torch, devguard
with devguard.guard(1):
    sleep(0)

def check(scope, owner):
    with scope:
        for _ in range(3):
            sleep(0)
            assert str(devguard.owner()) == owner, (devguard.owner(), owner)

pid = os.fork()
if pid == 0:
    wait([spawn(check, devguard.guard("cpu"), "cpu"), spawn(check, contextlib.nullcontext(), "None")])
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    assert run_simulated(program, gpus=4).stderr == ""
