"""Modes, door settings and the environment variables: what they may be, and how they are checked.

This module knows nothing of torch, of devices or of what a door does. It checks values and says what is
valid.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from devguard.errors import ConfigError

__all__ = ["MODES", "DoorMode", "Mode", "check_mode", "killed"]

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


def killed(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether ``DEVGUARD=off`` (or ``0``) forbids every door in this process, whatever the code asks for."""
    value = (os.environ if environ is None else environ).get("DEVGUARD", "")
    return value.strip().lower() in _KILL_VALUES
