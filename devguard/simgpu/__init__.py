"""Simulated GPUs: the real CUDA build of torch on N devices that do not exist.

`environment` returns the environment of a child process that sees such devices; `state` returns what each process
holds on each device. The simulation shows where data is placed. Copies and fills are exact, but kernels do not run, so
there is no arithmetic. Linux on x86-64 only, with a C compiler. Importing this module imports neither torch nor the
modules that build the overlay.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from devguard.errors import SimulationError
from devguard.simgpu.records import DeviceState, ProcessState, state

__all__ = ["active", "DeviceState", "environment", "ProcessState", "SimulationError", "state"]


def environment(
    gpus: int = 2,
    *,
    torch: str | None = None,
    memory: int | None = None,
    state: str | PathLike[str] | None = None,
    log: str | PathLike[str] | None = None,
    base: Mapping[str, str] | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Return the complete environment for a child process that sees simulated GPUs.

    The first call for a version of torch builds an overlay folder in the user's cache (about 1.3 GB, well under a
    minute once downloaded); later calls reuse it. The Python environment itself is not changed.

    Parameters
    ----------
    gpus : int
        The number of devices, 1 to 16.
    torch : str, optional
        The version of torch, such as ``"2.13.0"``. By default the version in this Python environment, or 2.13.0
        if it has none.
    memory : int, optional
        Bytes of memory of each device, rounded down to whole MiB; 8 GiB by default. Memory in use takes up
        host memory.
    state : path, optional
        The state file that all processes of one experiment share; it is created if it does not exist. By default a
        fresh file in the folder for temporary files: ``DEVGUARD_SIM_STATE`` in the result names it.
    log : path, optional
        A file that gets one line for each interesting CUDA call.
    base : mapping, optional
        The environment to start from, ``os.environ`` by default. Nothing is removed from it: the simulation honours
        CUDA_VISIBLE_DEVICES, for example.
    progress : bool
        Report progress on standard error while the overlay is built.

    Returns
    -------
    dict of str to str
        Pass it as ``env`` to `subprocess.run` or similar, with this same Python interpreter as the program.

    Raises
    ------
    SimulationError
        If simulated GPUs are not possible here. The message states the reason and what to do.
    """
    from devguard.simgpu.launch import child_environment

    return child_environment(gpus, torch=torch, memory=memory, state=state, log=log, base=base, progress=progress)


def active() -> bool:
    """Return whether this process runs on simulated GPUs.

    Returns
    -------
    bool
        True in a process that was started with the result of `environment`, and in its children.
    """
    import os

    return bool(os.environ.get("DEVGUARD_SIM_GPUS"))
