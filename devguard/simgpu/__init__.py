"""Simulated GPUs: the real CUDA build of torch on N devices that do not exist.

`environment` gives the environment of a child process that sees such devices, `state` tells what each process holds
on each of them. It shows where things land, and copies and fills are exact; kernels do not run, so it shows no
arithmetic. Linux on x86-64 only, with a C compiler. Importing this module imports neither torch nor what builds the
overlay.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from devguard.errors import SimulationError
from devguard.simgpu.records import DeviceState, ProcessState, state

__all__ = ["DeviceState", "ProcessState", "SimulationError", "active", "environment", "state"]


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
    """The complete environment for a child process that sees simulated GPUs.

    The first call for a version of torch makes an overlay folder in the user's cache (about 1.3 GB, well under a
    minute once downloaded); later calls reuse it. The Python environment itself is not changed.

    Parameters
    ----------
    gpus : int
        How many devices there are, 1 to 16.
    torch : str, optional
        The version of torch, such as ``"2.13.0"``. By default that of this Python environment, or 2.13.0 if it has
        none.
    memory : int, optional
        Bytes of memory of each device, rounded down to whole MiB; 8 GiB by default. Memory in use is taken from the
        host.
    state : path, optional
        The state file that all processes of one experiment share; it is made if it does not exist. By default a fresh
        file in the folder for temporary files: read its name from ``DEVGUARD_SIM_STATE`` in the result.
    log : path, optional
        A file that gets one line for each interesting CUDA call.
    base : mapping, optional
        The environment to start from, ``os.environ`` by default. Nothing of it is removed: CUDA_VISIBLE_DEVICES, for
        one, is honoured by the simulation.
    progress : bool
        Say on standard error what is being done while the overlay is made.

    Returns
    -------
    dict of str to str
        Pass it as ``env`` to `subprocess.run` and the like, with this very Python interpreter as the program.

    Raises
    ------
    SimulationError
        Simulated GPUs cannot be had here; the message says why, and what to do.
    """
    from devguard.simgpu.launch import child_environment

    return child_environment(gpus, torch=torch, memory=memory, state=state, log=log, base=base, progress=progress)


def active() -> bool:
    """Whether this process runs on simulated GPUs.

    Returns
    -------
    bool
        True in a process that was started with the result of `environment`, and in its children.
    """
    import os

    return bool(os.environ.get("DEVGUARD_SIM_GPUS"))
