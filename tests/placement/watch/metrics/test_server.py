"""A scrape of programs on simulated GPUs has the numbers of the simulation, while they run and after SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devguard import simgpu
from devguard.simgpu import records
from devguard.watch.metrics import collector
from devguard.watch.metrics.server import Server, serve
from devguard.watch.view import View
from tests.helpers.scrapes import Scrape, scrape
from tests.helpers.simulated import ROOT

PROGRAM = """
import sys, torch
from devguard import transport
from devguard.reporting import sampler
sampler.INTERVAL_S = 0.01
own = torch.ones(5 << 20, dtype=torch.uint8, device="cuda:2")
torch.save(torch.ones(3 << 20, dtype=torch.uint8, device="cuda:1"), sys.argv[1])
stray = torch.load(sys.argv[1])
arena = transport.Arena(budget="4MiB")
handle = arena.put(bytes(1 << 20), to=["tp0"])
print(handle.nbytes, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program that owns cuda:2, strays to cuda:1 and holds a lease; and the bytes of its payload."""
    environ = {
        **os.environ,
        "DEVGUARD": "observe",
        "DEVGUARD_DEVICE": "cuda:2",
        "DEVGUARD_LOG": str(tmp_path / "log"),
        "RANK": "2",
    }
    (tmp_path / "train.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "train.py", tmp_path / "tensor"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        yield started, int(started.stdout.readline())
        started.kill()


def scrape_until(server: Server, holds: Callable[[Scrape], bool]) -> Scrape:
    end = time.monotonic() + 60
    while not holds(found := scrape(server.url)):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_a_scrape_has_the_bytes_of_the_simulation_and_the_counters_of_a_killed_process_stay(
    program: tuple[subprocess.Popen[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "LOOK_S", 0.0)
    process, nbytes = program
    role, transport = "rank 2 train.py", "devguard_transport_"
    with contextlib.closing(serve(View(tmp_path / "log"), ":0")) as server:
        found = scrape_until(server, lambda found: bool(found.get(f"{transport}leases")))
        (state,) = (each for each in simgpu.state() if each.pid == process.pid)
        context = records.limits(os.environ["DEVGUARD_SIM_STATE"]).context_bytes
        held = found["devguard_process_gpu_memory_bytes"]
        assert {labels: held[labels] for labels in held if labels[3] == role} == {
            ("1", records.uuid_of(1), "cuda:2", role, "STRAY"): state.devices[1].bytes + context,
            ("2", records.uuid_of(2), "cuda:2", role, "own"): state.devices[2].bytes + context,
        }
        strays = found["devguard_strays_total"]
        assert strays == {("observed", "load", "cuda:1", "cuda:2"): 1}
        assert found["devguard_stray_bytes_total"] == dict.fromkeys(strays, 3 << 20)
        assert found[f"{transport}put_bytes_total"] == {(role, "cpu"): nbytes}
        assert found[f"{transport}in_use_bytes"] == {(role, "cpu"): -(-nbytes // 4096) * 4096}
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = scrape_until(server, lambda found: f"{transport}leases" not in found)
    assert role not in {labels[3] for labels in after.get("devguard_process_gpu_memory_bytes", {})}
    for name in ("devguard_strays_total", "devguard_stray_bytes_total", f"{transport}put_bytes_total"):
        assert after[name] == found[name]
    assert after["devguard_scrape_success"] == {(): 1}
