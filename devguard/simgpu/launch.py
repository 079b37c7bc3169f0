"""Assembles the environment variables of a process on simulated GPUs.

The overlay comes first on PYTHONPATH, the driver's libraries come first on LD_LIBRARY_PATH, and DEVGUARD_SIM_* hold the
settings that csrc/state.c reads. This module starts no process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu import cleanup, records

__all__ = ["checked", "child_environment", "MAX_GPUS"]

MAX_GPUS = records.DEVICES
MIB = 1 << 20
DEFAULT_MEMORY = 8 << 30
CONTEXT_BYTES = 256 * MIB


def child_environment(
    gpus: int,
    *,
    torch: str | None,
    memory: int | None,
    state: str | os.PathLike[str] | None,
    log: str | os.PathLike[str] | None,
    base: Mapping[str, str] | None,
    progress: bool,
) -> dict[str, str]:
    """Implement `devguard.simgpu.environment`, which describes the parameters."""
    size = checked(gpus, memory)
    from devguard.simgpu import overlay

    made = overlay.prepare(torch, progress=progress)
    result = dict(os.environ if base is None else base)
    root = str(overlay.cache_folder())
    _prepend(result, "PYTHONPATH", made.python_path, root)
    _prepend(result, "LD_LIBRARY_PATH", (made.driver_folder,), root)
    result["DEVGUARD_SIM_GPUS"] = str(gpus)
    result["DEVGUARD_SIM_MEMORY_MB"] = str(size // MIB)
    result["DEVGUARD_SIM_CONTEXT_MB"] = str(CONTEXT_BYTES // MIB)
    result["DEVGUARD_SIM_OVERLAY"] = str(made.folder)
    result["DEVGUARD_SIM_STATE"] = str(_state_file(state, size))
    result.pop("DEVGUARD_SIM_LOG", None)
    if log is not None:
        result["DEVGUARD_SIM_LOG"] = os.path.abspath(log)
    return result


def checked(gpus: int, memory: int | None) -> int:
    """Check both numbers, and return the bytes of memory of each device."""
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= MAX_GPUS:
        raise SimulationError(f"{gpus!r} is not a valid number of simulated GPUs: give a number from 1 to {MAX_GPUS}")
    size = DEFAULT_MEMORY if memory is None else memory
    if size < 2 * CONTEXT_BYTES:
        raise SimulationError(
            f"a simulated GPU with {size} bytes of memory is too small: a context alone takes {CONTEXT_BYTES}; "
            f"give at least {2 * CONTEXT_BYTES} (512 MiB)"
        )
    if size > 1 << 40:
        raise SimulationError(f"a simulated GPU with {size} bytes of memory is too big: give at most 1 TiB")
    return size


def _prepend(environment: dict[str, str], variable: str, folders: tuple[Path, ...], ours: str) -> None:
    """Put folders first, and drop the folders of an enclosing simulation."""
    kept = [
        entry
        for entry in environment.get(variable, "").split(os.pathsep)
        if entry and entry != ours and not entry.startswith(ours + os.sep)
    ]
    environment[variable] = os.pathsep.join([*map(str, folders), *kept])


def _state_file(state: str | os.PathLike[str] | None, memory: int) -> Path:
    if state is not None:
        path = Path(os.path.abspath(state))
    else:
        path = Path(tempfile.mkdtemp(prefix="devguard-sim-"), "state")
        cleanup.when_unused(path.parent)
    records.create(path, memory=memory, context_bytes=CONTEXT_BYTES)
    return path
