"""Every process on every GPU, as the driver counts it: by NVML, or by the state file of simulated GPUs.

NVML counts a process's context and all of its libraries, but knows no owner, and only the process IDs of the host. One
look takes milliseconds and holds a lock of the driver, so looks are a second apart (see `INTERVAL_S`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from devguard.errors import ConfigError
from devguard.simgpu import records

__all__ = ["find", "Gpu", "INTERVAL_S", "LEAST_INTERVAL_S", "Nvml", "Simulation", "Source"]

INTERVAL_S = 1.0
LEAST_INTERVAL_S = 0.5  # A shorter interval slows the programs on the GPUs.


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG device of it, as the driver counts it.

    Attributes
    ----------
    label : str
        Its number among the GPUs of the machine, such as ``"0"``; a MIG device is ``"0:1"``.
    uuid : str
        Without NVML's prefix ``GPU-`` or ``MIG-``, as torch names it.
    name : str
        The product.
    used, total : int or None
        Bytes; None if they cannot be read.
    processes : dict of int to int or None
        By process ID the bytes of each process with a context; the bytes are None where the driver does not say.
    mapped : frozenset of int
        The processes that have opened memory of others there (only the simulation knows).
    problem : str or None
        Why it cannot be read in full.
    """

    label: str
    uuid: str
    name: str = ""
    used: int | None = None
    total: int | None = None
    processes: dict[int, int | None] = field(default_factory=dict)
    mapped: frozenset[int] = frozenset()
    problem: str | None = None


class Source(Protocol):
    """Where the numbers come from.

    Attributes
    ----------
    name : str
        ``"NVML"`` or ``"simulation"``.
    """

    name: str

    def read(self) -> list[Gpu]:
        """Return all GPUs, in the order of their numbers."""
        ...


class Nvml:
    """The GPUs of this machine by nvidia-ml-py.

    Raises
    ------
    ConfigError
        If it is not installed, or if there is no driver.
    """

    name = "NVML"

    def __init__(self) -> None:
        try:
            pynvml: Any = importlib.import_module("pynvml")  # nvidia-ml-py has no types
        except ImportError:
            raise ConfigError("reading the GPUs needs nvidia-ml-py: pip install 'torch-devguard[watch]'.") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise ConfigError(f"NVML cannot be used: {error}. Is there an NVIDIA driver on this machine?") from None

    def read(self) -> list[Gpu]:
        """Return all GPUs; one that cannot be read has the reason in `problem`."""
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            raise ConfigError(f"NVML cannot count the GPUs: {error}.") from None
        return [gpu for number in range(count) for gpu in self._read(number)]

    def _read(self, number: int) -> Iterable[Gpu]:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
        except nvml.NVMLError as error:  # as after "GPU is lost"
            return [Gpu(str(number), f"unreadable-{number}", problem=str(error))]
        parts = self._mig_devices(handle)
        if parts:
            return [self._describe(f"{number}:{part}", each) for part, each in parts]
        return [self._describe(str(number), handle)]

    def _mig_devices(self, handle: Any) -> list[tuple[int, Any]]:
        nvml = self._nvml
        try:
            if not nvml.nvmlDeviceGetMigMode(handle)[0]:
                return []
            count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except nvml.NVMLError:  # no such thing on this GPU
            return []
        found = []
        for part in range(count):
            try:
                found.append((part, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, part)))
            except nvml.NVMLError:  # the numbers of MIG devices have gaps
                continue
        return found

    def _describe(self, label: str, handle: Any) -> Gpu:
        nvml, problems = self._nvml, []

        def ask(query: Any, *arguments: Any) -> Any:
            try:
                return query(handle, *arguments)
            except nvml.NVMLError as error:
                problems.append(str(error))
                return None

        uuid, name = _text(ask(nvml.nvmlDeviceGetUUID)), _text(ask(nvml.nvmlDeviceGetName))
        memory = ask(nvml.nvmlDeviceGetMemoryInfo)
        processes: dict[int, int | None] = {}
        for process in ask(nvml.nvmlDeviceGetComputeRunningProcesses) or ():
            processes[process.pid] = process.usedGpuMemory
        return Gpu(
            label,
            uuid.removeprefix("GPU-").removeprefix("MIG-") or f"unreadable-{label}",
            name,
            None if memory is None else memory.used,
            None if memory is None else memory.total,
            processes,
            problem="; ".join(dict.fromkeys(problems)) or None,
        )


def _text(found: Any) -> str:
    return found.decode(errors="replace") if isinstance(found, bytes) else found or ""


class Simulation:
    """Simulated GPUs, by their state file.

    Parameters
    ----------
    path : str
        The state file, which each process on them names in its log.
    """

    name = "simulation"

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> list[Gpu]:
        """Return all simulated GPUs that some process has seen; raises SimulationError if the file cannot be read."""
        seen = records.state(self._path)
        processes = [process for process in seen if process.alive]
        limits = records.limits(self._path)
        found = []
        for index in range(max((len(process.devices) for process in seen), default=0)):
            held: dict[int, int | None] = {}
            mapped = set()
            for process in processes:
                device = process.devices[index] if index < len(process.devices) else None
                if device is not None and device.context:
                    held[process.pid] = device.bytes + limits.context_bytes
                    if device.ipc_opens:
                        mapped.add(process.pid)
            used = sum(nbytes or 0 for nbytes in held.values())
            uuid, name = records.uuid_of(index), "simulated GPU"
            found.append(Gpu(str(index), uuid, name, used, limits.memory, held, frozenset(mapped)))
        return found


def find(simulations: Iterable[str] = ()) -> Source:
    """Return where to read the GPUs: the simulation that the processes of a log ran on, or else NVML.

    Parameters
    ----------
    simulations : iterable of str
        The state files that the processes of a log name.

    Raises
    ------
    ConfigError
        If there are several simulations, or neither a simulation nor NVML.
    """
    paths = sorted(set(simulations) or {os.environ.get("DEVGUARD_SIM_STATE", "")} - {""})
    if len(paths) > 1:
        raise ConfigError(
            f"the processes of this folder ran on {len(paths)} simulations ({', '.join(paths)}). Watch one at a time."
        )
    return Simulation(paths[0]) if paths else Nvml()
