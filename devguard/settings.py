"""Modes, door settings and the environment variables: what they may be, and how they are checked.

This module knows nothing of torch, of devices or of what a door does. It checks values and says what is
valid.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

from devguard.errors import ConfigError

__all__ = ["MODES", "DoorMode", "Mode", "check_doors", "check_mode", "killed"]

Mode = Literal["off", "observe", "warn", "repair", "error"]

# what one door may be told; which doors know more than the modes says the table of doors
DoorMode = Literal["off", "observe", "warn", "repair", "error", "copy", "uuid"]

MODES: tuple[Mode, ...] = ("off", "observe", "warn", "repair", "error")
DEFAULT_MODE: Mode = "repair"
REPAIRING: frozenset[DoorMode] = frozenset({"repair", "copy", "uuid"})  # modes that put right what strays

_KILL_VALUES = frozenset({"off", "0"})


def check_mode(mode: object) -> Mode:
    """Return `mode` if it is one of `MODES`; raise `ConfigError` otherwise."""
    if isinstance(mode, str) and mode in MODES:
        return mode
    raise ConfigError(f"{mode!r} is not a mode. Valid modes: {', '.join(MODES)}.")


def check_doors(
    doors: object, known: Iterable[str], extra: Mapping[str, tuple[DoorMode, ...]] | None = None
) -> dict[str, DoorMode]:
    """Return per-door modes as a dictionary of valid values; raise `ConfigError` for what means nothing.

    Parameters
    ----------
    doors : mapping of str to str
        The mode of each named door, such as ``{"load": "warn"}``.
    known : iterable of str
        The names of the doors that exist.
    extra : mapping of str to tuple of str, optional
        The modes beyond `MODES` that single doors know.
    """
    if not isinstance(doors, Mapping):
        raise ConfigError(f"doors must map door names to modes, such as {{'load': 'warn'}}; got {doors!r}.")
    names = sorted(known)
    checked: dict[str, DoorMode] = {}
    for name, mode in doors.items():
        if name not in names:
            raise ConfigError(f"there is no door {name!r}. Doors: {', '.join(names)}.")
        valid = (*MODES, *(extra or {}).get(name, ()))
        if mode not in valid:
            raise ConfigError(f"door {name!r}: {mode!r} is not a mode. Valid modes: {', '.join(valid)}.")
        checked[name] = mode
    return checked


def killed(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether ``DEVGUARD=off`` (or ``0``) forbids every door in this process, whatever the code asks for."""
    value = (os.environ if environ is None else environ).get("DEVGUARD", "")
    return value.strip().lower() in _KILL_VALUES
