"""Pinning happens only in processes that use CUDA, and opens no context on a GPU that the process does not own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.programs import PRELUDE, run_child

# Every program is its own reader. Its arena and the thread that listens for readers start on device 0, outside a guard.
START = (
    PRELUDE
    + """
import time
from devguard import transport
arena = transport.Arena(budget="8MiB")
transport.join(arena.address)
def mapped(): return "devguard-transport" in open("/proc/self/maps").read()
def unmap():
    global value
    value = None
    arena.close()
    deadline = time.monotonic() + 20
    while mapped() and time.monotonic() < deadline: time.sleep(0.01)
    assert not mapped()
"""
)


def run(code: str, log: Path) -> tuple[str, list[str]]:
    """Run a program, and return its output and the calls of the simulation that register host memory."""
    output = run_child(code, prelude=START, environment={"DEVGUARD_SIM_LOG": os.fspath(log)})
    lines = log.read_text().splitlines() if log.exists() else []
    return output, [line.split(" ", 2)[2] for line in lines if "hostRegister" in line]


def test_put_and_get_pin_on_the_owner_and_give_the_memory_back_there(tmp_path: Path) -> None:
    code = """
with devguard.guard("cuda:2"):
    value = arena.put(torch.ones(1 << 18).to("cuda:2")).get()
    print(value.device, float(value.cpu().sum()), ctx(), end=" ")
    unmap()
print(ctx())
"""
    output, registered = run(code, tmp_path / "log")
    assert output == "cuda:2 262144.0 [2] [2]"
    assert registered == ["2 hostRegister bytes=8388608"] * 2  # the sender's map and the reader's


def test_an_asynchronous_put_works_on_the_gpu_of_the_tensor(tmp_path: Path) -> None:
    code = """
import asyncio
with devguard.guard("cuda:1"):
    handle = asyncio.run(arena.put_async(torch.ones(1 << 18).to("cuda:1")))
    value = handle.get()
    print(value.device, float(value.cpu().sum()), ctx(), end=" ")
    unmap()
print(ctx())
"""
    output, registered = run(code, tmp_path / "log")
    assert output == "cuda:1 262144.0 [1] [1]"
    assert set(registered) == {"1 hostRegister bytes=8388608"}


def test_a_device_of_get_is_the_only_gpu_that_is_opened(tmp_path: Path) -> None:
    code = """
torch.cuda.init()
value = arena.put(torch.ones(1 << 18)).get(device="cuda:3")
print(value.device, ctx(), end=" ")
unmap()
print(ctx())
"""
    output, registered = run(code, tmp_path / "log")
    assert output == "cuda:3 [3] [3]"
    assert registered == ["3 hostRegister bytes=8388608"]  # the sender's tensor was on the host


@pytest.mark.parametrize("how", ["get()", "get(device='cpu')", "view().__enter__()"])
def test_a_process_that_does_not_use_cuda_pins_nothing_and_opens_nothing(tmp_path: Path, how: str) -> None:
    code = f"""
with devguard.guard("cpu"):
    value = arena.put(torch.ones(1 << 18)).{how}
    print(value.device, float(value.sum()), torch.cuda.is_initialized(), ctx(), end=" ")
    unmap()
print(ctx())
"""
    assert run(code, tmp_path / "log") == ("cpu 262144.0 False [] []", [])


def test_a_read_to_the_host_pins_nothing(tmp_path: Path) -> None:
    code = """
with devguard.guard("cuda:1"):
    torch.ones(8).to("cuda:1")
    print(arena.put(torch.ones(1 << 18)).get(device="cpu").device, ctx())
"""
    assert run(code, tmp_path / "log") == ("cpu [1]", [])


def test_two_threads_pin_a_map_once(tmp_path: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from devguard.transport import pinning
with devguard.guard("cuda:1"):
    torch.ones(8).to("cuda:1")
    handles = [arena.put(torch.ones(1 << 16)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        print({str(value.device) for value in pool.map(lambda handle: handle.get("cuda:1"), handles)}, end=" ")
print(list(pinning.failures), ctx())
"""
    output, registered = run(code, tmp_path / "log")
    assert output == "{'cuda:1'} [] [1]"
    assert registered == ["1 hostRegister bytes=8388608"]


def test_without_an_owner_a_read_is_not_pinned(tmp_path: Path) -> None:
    code = """
torch.ones(8).to("cuda:0")
value: object = arena.put(torch.ones(1 << 18)).get()
print(value.device, ctx())
"""
    found: Any = run(code, tmp_path / "log")
    assert found == ("cpu [0]", [])
