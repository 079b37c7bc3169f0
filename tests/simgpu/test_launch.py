"""The environment variables of a process on simulated GPUs."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest

from devguard import SimulationError
from devguard.simgpu import launch, overlay

GIB = 1 << 30


@pytest.fixture
def child_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``child_environment(base, **options)``: the environment with an overlay that is only a folder name."""
    cache = tmp_path / "cache"
    made = types.SimpleNamespace(
        folder=cache / "made", python_path=(cache / "made/site",), driver_folder=cache / "made/driver"
    )
    monkeypatch.setattr(overlay, "prepare", lambda torch, progress: made)
    monkeypatch.setattr(overlay, "cache_folder", lambda: cache)
    options = {"torch": None, "memory": None, "state": tmp_path / "state", "log": None, "progress": False}
    return lambda base, **chosen: launch.child_environment(2, base=base, **options | chosen)


@pytest.mark.parametrize("gpus", [0, 17, -1, True, "2", 1.0])
def test_a_bad_number_of_gpus_is_an_error(gpus: Any) -> None:
    with pytest.raises(SimulationError, match="give a number from 1 to 16"):
        launch.checked(gpus, None)


@pytest.mark.parametrize(("memory", "message"), [(1 << 28, "too small"), (1 << 41, "too big")])
def test_a_bad_size_of_memory_is_an_error(memory: int, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        launch.checked(1, memory)
    assert launch.checked(1, None) == 8 * GIB


def test_the_overlay_comes_first_on_both_paths(child_environment: Any, tmp_path: Path) -> None:
    found = child_environment({"PYTHONPATH": "/other", "LD_LIBRARY_PATH": "/lib"}, memory=GIB)
    made = tmp_path / "cache/made"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(made / "site"), "/other"]
    assert found["LD_LIBRARY_PATH"].split(os.pathsep) == [str(made / "driver"), "/lib"]
    assert (found["DEVGUARD_SIM_GPUS"], found["DEVGUARD_SIM_MEMORY_MB"]) == ("2", "1024")


def test_a_simulation_inside_another_replaces_its_paths_and_its_log(child_environment: Any, tmp_path: Path) -> None:
    outer = child_environment({"PYTHONPATH": "/other"}, log=tmp_path / "log")
    assert outer["DEVGUARD_SIM_LOG"] == str(tmp_path / "log")
    inner = child_environment(outer)
    assert inner["PYTHONPATH"] == outer["PYTHONPATH"]
    assert "DEVGUARD_SIM_LOG" not in inner


def test_without_a_state_file_each_environment_has_a_fresh_one(child_environment: Any) -> None:
    first, second = (child_environment({}, state=None)["DEVGUARD_SIM_STATE"] for _ in range(2))
    assert first != second
    assert Path(first).exists()
    for path in (first, second):
        Path(path).unlink()
        Path(path).parent.rmdir()
