"""The simulation's NVML and its state file give the same view, to the byte."""

from __future__ import annotations

import os

import torch

from devguard.watch import gpus


def test_nvml_and_the_state_file_agree() -> None:
    kept = [torch.ones(7 << 20, dtype=torch.uint8, device=f"cuda:{index}") for index in (1, 3)]
    found, by_nvml = gpus.Simulation(os.environ["DEVGUARD_SIM_STATE"]).read(), gpus.Nvml().read()
    assert len(found) == len(by_nvml) == torch.cuda.device_count()
    for ours, theirs in zip(found, by_nvml, strict=True):
        assert (ours.label, ours.uuid, ours.used, ours.total) == (theirs.label, theirs.uuid, theirs.used, theirs.total)
        assert ours.processes == theirs.processes
        assert (ours.problem, theirs.problem) == (None, None)
    held = found[1].processes[os.getpid()], found[0].processes.get(os.getpid())
    assert held[0] is not None
    assert held[0] >= torch.cuda.memory_reserved(1) > 0
    assert len(kept) == 2
