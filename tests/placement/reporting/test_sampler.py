"""Samples of the memory of simulated GPUs agree with torch and with the simulation, and open nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from devguard import simgpu
from devguard.reporting import process_state, sampler
from devguard.support import accelerator
from devguard.watch.folder import Folder
from tests.helpers.simulated import ROOT


def test_a_sample_has_the_bytes_of_each_device_with_a_context_and_opens_none() -> None:
    kept = [torch.ones(3 << 20, dtype=torch.uint8, device="cuda:2"), torch.ones(8, device="cuda:1")]
    before = accelerator.contexts()
    memory = sampler.take_sample()["memory"]
    assert accelerator.contexts() == before
    assert set(memory) == {f"cuda:{index}" for index in before}
    for tag, (allocated, reserved, peak) in memory.items():
        assert (allocated, reserved) == (torch.cuda.memory_allocated(tag), torch.cuda.memory_reserved(tag))
        assert peak == torch.cuda.max_memory_allocated(tag)
    (process,) = (each for each in simgpu.state() if each.pid == os.getpid())
    assert {f"cuda:{gpu.index}": gpu.bytes for gpu in process.devices if gpu.context} == {
        tag: reserved for tag, (_, reserved, _) in memory.items()
    }
    assert len(kept) == 2


def test_the_state_names_each_gpu_that_the_process_sees() -> None:
    torch.ones(1, device="cuda:1")
    gpus = process_state.owners()["gpus"]
    assert gpus == {f"cuda:{index}": accelerator.uuid_of(index) for index in range(torch.cuda.device_count())}


def test_a_killed_process_leaves_its_last_sample(tmp_path: Path) -> None:
    (tmp_path / sampler.RECORDED).touch()
    environ = {**os.environ, "DEVGUARD": "repair", "DEVGUARD_DEVICE": "cuda:1", "DEVGUARD_LOG": str(tmp_path)}
    program = (
        "import os, signal, time, torch\nfrom pathlib import Path\nfrom devguard.reporting import sampler\n"
        "sampler.INTERVAL_S = 0.01\nx = torch.ones(5 << 20, dtype=torch.uint8, device='cuda')\n"
        f"while '\"now\"' not in next(Path({str(tmp_path)!r}).glob('*.jsonl')).read_text(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, check=False, timeout=120)
    assert done.returncode == -9
    (journal,) = Folder(tmp_path).update()
    (sample,) = journal.samples
    held = next(each for each in simgpu.state() if each.pid == journal.process.pid).devices[1].bytes
    assert sample.memory == {"cuda:1": (5 << 20, held, 5 << 20)}
    assert not journal.is_running()
