"""Finding the owner of a process that does not name one: in ``DEVGUARD_DEVICE``, or in what the launcher sets.

``RANK`` is never used: it counts processes over all machines, and a device index counts the GPUs that one process sees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from devguard.errors import ConfigError, DeviceResolutionError
from devguard.ownership.owner import CPU, Owner, owner_of_index, parse_owner
from devguard.support import accelerator

__all__ = ["is_one_of_several", "Launcher", "LAUNCHERS", "local_size", "owner_from_environment", "owner_not_found"]


class Launcher(NamedTuple):
    """The variables by which one launcher tells a process its place on this machine."""

    rank: str
    size: tuple[str, ...]


LAUNCHERS = (
    Launcher("LOCAL_RANK", ("LOCAL_WORLD_SIZE",)),
    Launcher("SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")),
    Launcher("OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
    Launcher("MV2_COMM_WORLD_LOCAL_RANK", ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    Launcher("MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    Launcher("PMI_LOCAL_RANK", ("PMI_LOCAL_SIZE",)),
    Launcher("PALS_LOCAL_RANKID", ("PALS_LOCAL_SIZE",)),
)


def local_size(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return which variable says that several local ranks exist, and how many; None if none says so."""
    for launcher in LAUNCHERS:
        for name in launcher.size:
            # SLURM writes "4" or "4(x2),3": tasks on the nodes in turn
            match = re.match(r"\s*(\d+)", environ.get(name, ""))
            if match and int(match[1]) > 1:
                return name, int(match[1])
    return None


def is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Tell whether the launcher says that this process is one of several on this machine.

    Some (Lightning) set no local size; whoever has a local rank above 0 is not alone all the same.
    """
    ranks = (environ.get(launcher.rank, "").strip() for launcher in LAUNCHERS)
    return local_size(environ) is not None or any(rank.isdecimal() and int(rank) > 0 for rank in ranks)


def owner_from_environment(environ: Mapping[str, str] | None = None) -> tuple[Owner | None, list[str]]:
    """Find the owner in ``DEVGUARD_DEVICE`` or in what the launcher says.

    Parameters
    ----------
    environ : mapping, optional
        The environment; ``os.environ`` by default.

    Returns
    -------
    owner : Owner or None
        None if nothing names one.
    looked : list of str
        What was looked at, for a message.

    Raises
    ------
    ConfigError
        If ``DEVGUARD_DEVICE`` would give several local ranks one and the same GPU.
    DeviceResolutionError
        If a variable holds something that is not a device of this process.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("DEVGUARD_DEVICE", "").strip()
    if named:
        owner = parse_owner(named, "DEVGUARD_DEVICE")
        several = local_size(environ)
        if owner is not CPU and several is not None:
            raise ConfigError(
                f"DEVGUARD_DEVICE={named} would give one GPU to every process of this job, and {several[0]} says that "
                f"{several[1]} run on this machine. Unset DEVGUARD_DEVICE: each process then takes its local rank."
            )
        return owner, []
    looked = ["DEVGUARD_DEVICE"]
    for launcher in LAUNCHERS:
        text = environ.get(launcher.rank, "").strip()
        if not text:
            looked.append(launcher.rank)
            continue
        if text == "-1":
            looked.append(f"{launcher.rank} (-1, not distributed)")
            continue
        if not text.isdecimal():
            raise DeviceResolutionError(
                f"{launcher.rank} is {text!r}, not a rank. Valid: a number from 0 on, or unset; or name the device."
            )
        accelerator.torch_module()  # for the count
        count = accelerator.device_count()
        if count == 1:
            return owner_of_index(
                0
            ), looked  # the launcher gave this process one GPU of its own: the rank is no index into it
        if int(text) >= count:
            raise accelerator.out_of_range(f"{launcher.rank}={text}", int(text))
        return owner_of_index(int(text)), looked
    return None, looked


def owner_not_found(looked: list[str], tried_first: str = "") -> DeviceResolutionError:
    """Return the error for an owner that nothing names."""
    before = f"{tried_first}, " if tried_first else ""
    return DeviceResolutionError(
        f"which GPU does this process own? Nothing says so. Looked at: {before}{', '.join(looked)}, the enclosing "
        "guard. Name the device, as in guard('cuda:1') or DEVGUARD_DEVICE=cuda:1, or use a launcher that sets "
        "LOCAL_RANK."
    )
