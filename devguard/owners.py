"""Whose device is this: the owner as a value, and how it is found when nobody names it.

An owner is one device: ``cuda:<index>``, or ``cpu`` for a process that owns no accelerator (a tokenizer, a
router). Owners are interned: there is one object per device, so that they compare by identity. ``RANK``
never plays a part: it counts processes over all machines, and a device index counts the GPUs that one
process sees.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from devguard import accelerator
from devguard.errors import ConfigError, DeviceResolutionError

__all__ = ["CPU", "LAUNCHERS", "UNKNOWN", "Owner", "from_environment", "of_index", "owned", "parse", "several"]


class Owner:
    """A device that a process, thread or scope owns.

    Attributes
    ----------
    index : int
        The CUDA device index, or -1 for ``cpu``.
    tag : str
        ``"cuda:<index>"`` or ``"cpu"``, as torch writes it into files.
    device : torch.device or None
        The same as torch's own value. None until the owner was first entered in this process: naming one imports no
        torch and checks nothing.
    """

    __slots__ = ("device", "index", "tag")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tag = "cpu" if index < 0 else f"cuda:{index}"
        self.device: Any = None

    def __repr__(self) -> str:
        return f"<owner {self.tag}>"


CPU = Owner(-1)
UNKNOWN = Owner(-2)  # what a scope has whose owner is found on entry; it is never entered itself
INTERNED: dict[int, Owner] = {-1: CPU}


def of_index(index: int) -> Owner:
    """Return the one owner with this index."""
    owner = INTERNED.get(index)
    if owner is None:
        owner = INTERNED.setdefault(index, Owner(index))
    return owner


def owned() -> list[str]:
    """Return the tag of every owner that was in force in this process since the doors were opened."""
    return [owner.tag for _, owner in sorted(INTERNED.copy().items()) if owner.device is not None]


_DEVICE = re.compile(r"(?:cuda:)?(\d+)", re.ASCII)
_VALID = "a device such as 'cuda:1', 1 or torch.device('cuda', 1), or 'cpu' for a process that owns no accelerator"


def parse(device: object, what: str = "the device") -> Owner:
    """Return the owner that `device` names.

    Parameters
    ----------
    device : int, str or torch.device
        An index, ``"cuda:1"``, ``"1"``, ``"cpu"`` or a ``torch.device``.
    what : str
        Where it came from, for the message.

    Raises
    ------
    DeviceResolutionError
        If it names no device that can be owned.
    """
    if isinstance(device, bool):
        raise DeviceResolutionError(f"{what} is {device!r}, a truth value. Valid: {_VALID}.")
    if isinstance(device, str):
        text = device.strip().lower()
        if text == "cpu":
            return CPU
        match = _DEVICE.fullmatch(text)
        if match:
            return of_index(int(match[1]))
        if text == "cuda":
            raise DeviceResolutionError(
                f"{what} is 'cuda' without an index, which names no one device. Valid: {_VALID}; or leave it out, and "
                "it is taken from LOCAL_RANK and its like."
            )
        raise DeviceResolutionError(f"{what} is {device!r}. Valid: {_VALID}.")
    kind = getattr(device, "type", None)
    if isinstance(kind, str) and hasattr(device, "index"):  # a torch.device, recognised without importing torch
        return parse(str(device), what)
    try:
        index = operator.index(device)  # type: ignore[arg-type]
    except TypeError:
        raise DeviceResolutionError(f"{what} is {device!r}. Valid: {_VALID}.") from None
    if index < 0:
        raise DeviceResolutionError(f"{what} is {index}, a negative index. Valid: {_VALID}.")
    return of_index(index)


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


def several(environ: Mapping[str, str]) -> bool:
    """Tell whether the launcher says that this process is one of several on this machine.

    Some (Lightning) set no local size; whoever has a local rank above 0 is not alone all the same.
    """
    ranks = (environ.get(launcher.rank, "").strip() for launcher in LAUNCHERS)
    return local_size(environ) is not None or any(rank.isdecimal() and int(rank) > 0 for rank in ranks)


def from_environment(environ: Mapping[str, str] | None = None) -> tuple[Owner | None, list[str]]:
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
        owner = parse(named, "DEVGUARD_DEVICE")
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
            return of_index(
                0
            ), looked  # the launcher gave this process one GPU of its own: the rank is no index into it
        if int(text) >= count:
            raise accelerator.out_of_range(f"{launcher.rank}={text}", int(text))
        return of_index(int(text)), looked
    return None, looked


def not_found(looked: list[str], tried_first: str = "") -> DeviceResolutionError:
    """Return the error for an owner that nothing names."""
    before = f"{tried_first}, " if tried_first else ""
    return DeviceResolutionError(
        f"which GPU does this process own? Nothing says so. Looked at: {before}{', '.join(looked)}, the enclosing "
        "guard. Name the device, as in guard('cuda:1') or DEVGUARD_DEVICE=cuda:1, or use a launcher that sets "
        "LOCAL_RANK."
    )
