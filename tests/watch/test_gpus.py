"""The driver's view, by a stand-in for nvidia-ml-py; tests/placement/watch/test_gpus.py asks the simulation's NVML."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from devguard import ConfigError
from devguard.simgpu import records
from devguard.watch import gpus

GIB = 1 << 30


class NVMLError(Exception):
    pass


class Library(types.ModuleType):
    """nvidia-ml-py on a machine with these devices: (UUID, MIG devices, what fails)."""

    NVMLError = NVMLError

    def __init__(self, devices: list[dict[str, Any]], driver: bool = True) -> None:
        super().__init__("pynvml")
        self._devices, self._driver = devices, driver

    def nvmlInit(self) -> None:
        if not self._driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self._devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self._ask(self._devices[index], "handle", self._devices[index])

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        if "mig" not in handle:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in handle["mig"]:
            raise NVMLError("Not Found")
        return dict(handle["mig"][index])

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> Any:
        return self._ask(handle, "uuid", handle["uuid"])

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> Any:
        return self._ask(handle, "name", b"NVIDIA H100")

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        return self._ask(handle, "memory", types.SimpleNamespace(used=3 * GIB, total=80 * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> Any:
        found = [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.get("pids", {}).items()]
        return self._ask(handle, "processes", found)

    def _ask(self, handle: dict[str, Any], what: str, answer: Any) -> Any:
        if what in handle.get("fails", ()):
            raise NVMLError(f"no {what}")
        return answer


def read(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, Any]) -> list[gpus.Gpu]:
    monkeypatch.setitem(sys.modules, "pynvml", Library(list(devices)))
    return gpus.Nvml().read()


def test_every_gpu_has_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = read(monkeypatch, {"uuid": "GPU-a", "pids": {7: 5, 8: None}}, {"uuid": b"GPU-b"})
    assert (first.label, first.uuid, first.name, first.used, first.total) == (
        "0",
        "a",
        "NVIDIA H100",
        3 * GIB,
        80 * GIB,
    )
    assert (first.processes, first.problem) == ({7: 5, 8: None}, None)
    assert (second.label, second.uuid, second.processes) == ("1", "b", {})


def test_each_mig_device_is_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {0: {"uuid": "MIG-x", "pids": {7: 5}}, 3: {"uuid": "MIG-y"}}
    found = read(monkeypatch, {"uuid": "GPU-a", "mig": parts}, {"uuid": "GPU-b"})
    assert [(gpu.label, gpu.uuid) for gpu in found] == [("0:0", "x"), ("0:3", "y"), ("1", "b")]
    assert found[0].processes == {7: 5}


@pytest.mark.parametrize("what", ["handle", "uuid", "name", "memory", "processes"])
def test_a_gpu_that_cannot_be_read_is_shown_with_the_reason(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    bad, good = read(monkeypatch, {"uuid": "GPU-a", "pids": {7: 5}, "fails": [what]}, {"uuid": "GPU-b"})
    assert bad.problem == f"no {what}"
    assert (bad.label, good.uuid, good.problem) == ("0", "b", None)
    assert bad.uuid != good.uuid
    assert (bad.used is None) == (what in ("memory", "handle"))


def test_a_machine_without_a_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library([], driver=False))
    with pytest.raises(ConfigError, match=r"Driver Not Loaded.*NVIDIA driver"):
        gpus.find()


def test_a_missing_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("DEVGUARD_SIM_STATE", raising=False)
    with pytest.raises(ConfigError, match=r"torch-devguard\[watch\]"):
        gpus.find()


def test_a_simulation_that_the_processes_name_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = tmp_path / "state"
    records.create(state, memory=GIB, context_bytes=5)
    found = gpus.find([str(state), str(state)])
    assert (found.name, found.read()) == ("simulation", [])
    monkeypatch.setenv("DEVGUARD_SIM_STATE", str(state))
    assert gpus.find().name == "simulation"
    with pytest.raises(ConfigError, match="2 simulations"):
        gpus.find([str(state), "/other"])


def test_simulated_gpus_stay_when_the_processes_on_them_have_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = types.SimpleNamespace(context=True, bytes=5, ipc_opens=0)
    processes = [types.SimpleNamespace(pid=7, alive=False, devices=[device, device])]
    monkeypatch.setattr(records, "state", lambda path: processes)
    monkeypatch.setattr(records, "limits", lambda path: types.SimpleNamespace(memory=80, context_bytes=1))
    found = gpus.Simulation(str(tmp_path / "state")).read()
    assert [(gpu.label, gpu.used, gpu.processes) for gpu in found] == [("0", 0, {}), ("1", 0, {})]
