"""Compiling the simulated CUDA libraries; tests/simgpu/test_overlay.py builds all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from devguard import SimulationError
from devguard.simgpu import native


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the torch 99.1.0 of these tests, a CUDA 13.0 build."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/version.py").write_text("__version__ = '99.1.0+cu130'\ncuda: object = '13.0'\n")
    (tmp_path / "torch/lib/libtorch_cuda.so").write_bytes(b"")
    return tmp_path


def test_the_cuda_version_is_read_without_importing_torch(site: Path) -> None:
    assert native.cuda_version(site) == "13.0"


def test_a_torch_without_cuda_is_an_error(site: Path) -> None:
    version = site / "torch/version.py"
    version.write_text("__version__ = '99.1.0+cpu'\ncuda: object = None\n")
    with pytest.raises(SimulationError, match="not a CUDA build"):
        native.cuda_version(site)
    version.write_text("cuda: object = '13.0'\n")
    (site / "torch/lib/libtorch_cuda.so").unlink()
    with pytest.raises(SimulationError, match="not a CUDA build"):
        native.cuda_version(site)


@pytest.mark.parametrize("tool", ["readelf", "nm"])
def test_a_missing_tool_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    for name in {"cc", "readelf", "nm"} - {tool}:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SimulationError, match=f"simulated GPUs need {tool}: install binutils"):
        native.compiler()
