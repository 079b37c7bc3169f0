"""Modes and the settings of doors: their valid values, and the checks of them.

This module depends on neither torch nor a door.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from devguard.errors import ConfigError

__all__ = ["check_mode", "DoorMode", "is_killed", "Mode", "MODES"]

Mode = Literal["off", "observe", "warn", "repair", "error"]

# The settings of a single door. EXTRA_MODES in doors/table.py names the doors that accept more than the modes.
DoorMode = Literal["off", "observe", "warn", "repair", "error", "copy", "uuid"]

MODES: tuple[Mode, ...] = ("off", "observe", "warn", "repair", "error")
DEFAULT_MODE: Mode = "repair"
REPAIRING: frozenset[DoorMode] = frozenset({"repair", "copy", "uuid"})  # Settings that repair a stray.

_KILL_VALUES = frozenset({"off", "0"})


def check_mode(mode: object) -> Mode:
    """Return `mode` if it is one of `MODES`; raise `ConfigError` otherwise."""
    if isinstance(mode, str) and mode in MODES:
        return mode
    raise ConfigError(f"{mode!r} is not a mode. Valid modes: {', '.join(MODES)}.")


def is_killed(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether ``DEVGUARD=off`` (or ``0``) keeps every door of this process closed, whatever code requests."""
    value = (os.environ if environ is None else environ).get("DEVGUARD", "")
    return value.strip().lower() in _KILL_VALUES
