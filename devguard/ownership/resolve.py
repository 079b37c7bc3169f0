"""The owner from the environment: ``DEVGUARD_DEVICE``, or the launcher's local rank.

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
from devguard.support.installed_torch import import_torch

__all__ = [
    "has_local_siblings",
    "is_one_visible",
    "Launcher",
    "LAUNCHERS",
    "local_size",
    "owner_from_environment",
    "owner_not_found",
]


class Launcher(NamedTuple):
    """The variables that one launcher sets for the place of a process on its machine: local rank and local size."""

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
    """Return the variable that counts several local ranks, and their number; None if there is no such variable."""
    for launcher in LAUNCHERS:
        for name in launcher.size:
            # SLURM writes "4" or "4(x2),3": the tasks of each node in turn.
            match = re.match(r"\s*(\d{1,9})(?!\d)", environ.get(name, ""))
            if match and int(match[1]) > 1:
                return name, int(match[1])
    return None


def has_local_siblings(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher's variables show that this process is one of several on this machine.

    Some launchers (Lightning) set no local size, but a local rank above 0 shows it as well.
    """
    ranks = (environ.get(launcher.rank, "").strip() for launcher in LAUNCHERS)
    return local_size(environ) is not None or any(_is_rank(rank) and int(rank) > 0 for rank in ranks)


def _is_rank(text: str) -> bool:
    return text.isdecimal() and len(text) <= 9  # Python refuses to read some thousands of digits.


def is_one_visible(environ: Mapping[str, str]) -> bool:
    """Return whether ``CUDA_VISIBLE_DEVICES`` makes one GPU visible."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    return bool(visible) and "," not in visible and visible != "-1"


def _check_for_one_rank(named: str, owner: Owner, environ: Mapping[str, str]) -> None:
    """Check that ``DEVGUARD_DEVICE`` does not give one GPU to several local ranks.

    A wrapper script can set it for each rank, and one process cannot see what the others have. So it is valid if it is
    the local rank, or if each rank sees one GPU only.
    """
    several = local_size(environ)
    if several is None or owner is CPU or (is_one_visible(environ) and owner.index == 0):
        return
    ranks = ((launcher.rank, environ.get(launcher.rank, "").strip()) for launcher in LAUNCHERS)
    name, rank = next(((name, rank) for name, rank in ranks if _is_rank(rank)), ("", ""))
    if rank and int(rank) == owner.index:
        return
    own = f" The local rank of this one is {rank} ({name})." if rank else ""
    raise ConfigError(
        f"DEVGUARD_DEVICE={named} would give one GPU to every process of this job, and {several[0]} counts "
        f"{several[1]} of them on this machine.{own} Unset DEVGUARD_DEVICE: each process then takes its local rank. "
        "For another GPU, call devguard.install or devguard.guard in the program, or make one GPU visible to each rank "
        "with CUDA_VISIBLE_DEVICES."
    )


def owner_from_environment(environ: Mapping[str, str] | None = None) -> tuple[Owner | None, list[str]]:
    """Find the owner in ``DEVGUARD_DEVICE`` or in the launcher's variables.

    Parameters
    ----------
    environ : mapping, optional
        The environment; ``os.environ`` by default.

    Returns
    -------
    owner : Owner or None
        None if no variable names one.
    looked : list of str
        The variables that were read, for a message.

    Raises
    ------
    ConfigError
        If ``DEVGUARD_DEVICE`` would give several local ranks the same GPU.
    DeviceResolutionError
        If a variable holds something that is not a device of this process.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("DEVGUARD_DEVICE", "").strip()
    if named:
        owner = parse_owner(named, "DEVGUARD_DEVICE")
        _check_for_one_rank(named, owner, environ)
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
        if not _is_rank(text):
            raise DeviceResolutionError(
                f"{launcher.rank} is {text!r}, not a rank. Valid: a number, from 0, or unset. Or name the device."
            )
        import_torch()  # without torch, device_count() is 0
        count = accelerator.device_count()
        if count == 1:
            # The launcher made one GPU visible to this process, so the rank is not an index of a visible device.
            return owner_of_index(0), looked
        if int(text) >= count:
            raise accelerator.out_of_range(f"{launcher.rank}={text}", int(text))
        return owner_of_index(int(text)), looked
    return None, looked


def owner_not_found(looked: list[str], tried_first: str = "") -> DeviceResolutionError:
    """Return the error for a process without a named owner."""
    before = f"{tried_first}, " if tried_first else ""
    return DeviceResolutionError(
        f"cannot tell which GPU this process owns. Looked at: {before}{', '.join(looked)}, the enclosing guard. Name "
        "the device, as in guard('cuda:1') or DEVGUARD_DEVICE=cuda:1, or use a launcher that sets LOCAL_RANK."
    )
