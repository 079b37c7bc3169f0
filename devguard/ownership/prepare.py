"""Preparing this process, once for each owner, before the owner's first entry."""

from __future__ import annotations

from collections.abc import Callable

from devguard.modes import DoorMode
from devguard.ownership import greenlets
from devguard.ownership.owner import INTERNED, Owner
from devguard.ownership.stack import changing, prepare_again, stacks
from devguard.support import accelerator
from devguard.support.installed_torch import import_torch

__all__ = ["forget", "on_prepare", "prepare"]

ModeOf = Callable[[str], "DoorMode | None"]

# Called for each owner before its first entry, with the modes that its scope sets.
on_prepare: list[Callable[[Owner, ModeOf], None]] = []

# Called for each owner after that.
on_prepared: list[Callable[[Owner], None]] = []


def _no_mode(door: str) -> DoorMode | None:
    """Leave the mode of every door to the scopes around."""
    return None


def prepare(owner: Owner, mode_of: ModeOf = _no_mode) -> None:
    """Prepare this process for the first entry of `owner`.

    Parameters
    ----------
    owner : Owner
        The owner that is about to be entered.
    mode_of : callable
        ``mode_of(door)`` returns the mode that the scope to be entered sets for a door, None if it sets none.

    Raises
    ------
    DeviceResolutionError
        If this process does not see the device, or if this torch has no CUDA.
    """
    if owner.index >= 0:
        accelerator.bind()  # raises in a build without CUDA
        if owner.index >= accelerator.device_count():
            raise accelerator.out_of_range("the guard", owner.index)
    greenlets.on_import(prepare_again)
    for look in tuple(on_prepare):
        look(owner, mode_of)
    owner.device = import_torch().device(owner.tag)
    for note in tuple(on_prepared):
        note(owner)


def forget() -> None:
    """Prepare every owner and every thread again: the doors were closed."""
    for owner in list(INTERNED.values()):
        owner.device = None
    greenlets.stop()
    for stack in stacks():
        stack.forget_device()
    changing.clear()
