"""The face of the simulation: asking for an environment is cheap and safe until an overlay is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from devguard import SimulationError, simgpu
from tests.helpers.simulated import ROOT


def test_importing_it_imports_neither_torch_nor_the_builder() -> None:
    code = "import sys, devguard.simgpu; print({'torch', 'devguard.simgpu.overlay'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("2", True)])
def test_active_reads_the_environment(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("DEVGUARD_SIM_GPUS", raising=False)
    if value is not None:
        monkeypatch.setenv("DEVGUARD_SIM_GPUS", value)
    assert simgpu.active() is expected


def test_a_bad_number_of_gpus_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="a number from 1 to 16"):
        simgpu.environment(17, state=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_starts_from_the_base(sim_environment) -> None:
    environment = sim_environment(3, base={"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"})
    assert environment["DEVGUARD_SIM_GPUS"] == "3"
    assert (environment["PATH"], environment["CUDA_VISIBLE_DEVICES"]) == ("/bin", "1")
    assert Path(environment["DEVGUARD_SIM_STATE"]).exists()
