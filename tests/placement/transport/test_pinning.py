"""Pinned maps: made and undone on the owner's GPU, on whichever thread, and never a context elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ROUND = """
import json, os, sys, time
import torch, devguard
from devguard import transport
if os.environ["OWNER"]:
    devguard.install("error", os.environ["OWNER"])
arena = transport.Arena("cpu", budget="4MiB")
def pinned(): return sum("hostRegister" in line for line in open(os.environ["LOG"]))
"""


def run(
    run_simulated: Callable[..., Any], sim_environment: Callable[..., dict[str, str]], code: str, path: Any, owner: str
) -> Any:
    environ = sim_environment(3, log=path)
    return json.loads(
        run_simulated(ROUND + code, env={**environ, "LOG": str(path), "OWNER": owner}).stdout.splitlines()[-1]
    )


@pytest.mark.parametrize("owner", ["cuda:1", ""], ids=["guarded", "unguarded"])
def test_both_sides_pin_once_and_unpin_on_their_gpu(
    run_simulated: Callable[..., Any], sim_environment: Callable[..., dict[str, str]], tmp_path: Any, owner: str
) -> None:
    code = """
torch.cuda.set_device(1)
value = torch.ones(300_000, device="cuda:1")
for _ in range(3):
    assert arena.put(value).get(device="cuda:1").device.index == 1
arena.close()  # the reader's thread, which has chosen no GPU, gives its map back
deadline = time.monotonic() + 20
while time.monotonic() < deadline and len(open("/proc/self/maps").read().split("devguard-transport")) > 2:
    time.sleep(0.01)
print(json.dumps([pinned(), [str(device) for device in devguard.contexts()]]))
"""
    assert run(run_simulated, sim_environment, code, tmp_path / "log", owner) == [2, ["cuda:1"]]


def test_a_cpu_owner_pins_nothing_and_opens_no_context(
    run_simulated: Callable[..., Any], sim_environment: Callable[..., dict[str, str]], tmp_path: Any
) -> None:
    code = """
assert arena.put(torch.ones(300_000)).get().device.type == "cpu"
count = pinned() if os.path.exists(os.environ["LOG"]) else 0
print(json.dumps([count, [str(device) for device in devguard.contexts()]]))
"""
    assert run(run_simulated, sim_environment, code, tmp_path / "log", "cpu") == [0, []]
