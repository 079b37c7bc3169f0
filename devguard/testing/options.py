"""What the options of the pytest plugin ask for, checked.

The command line goes before ``DEVGUARD`` in the environment, and that before the ini file: where DEVGUARD is set and no
``--devguard`` is given, the plugin stays out of the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest

from devguard import modes
from devguard.activation import environment
from devguard.errors import ConfigError
from devguard.modes import DoorMode, Mode
from devguard.simgpu.launch import MAX_GPUS

__all__ = ["CHECKS", "Options", "gpus", "only_asks", "read"]

_ASKING = ("help", "version", "markers", "cacheshow")


class Options(NamedTuple):
    """How tests are guarded.

    Attributes
    ----------
    mode : str
        What the doors do with a stray.
    doors : dict of str to str
        The mode of single doors.
    """

    mode: Mode
    doors: dict[str, DoorMode]


def _gpus(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > MAX_GPUS:
        raise ConfigError(f"{text!r} simulated GPUs cannot be made: give a number from 1 to {MAX_GPUS}, or 0 for none.")
    return int(text)


CHECKS: dict[str, Callable[[str], Any]] = {
    "devguard_mode": modes.check_mode,
    "devguard_doors": lambda text: environment.parse_doors(text, "--devguard-doors"),
    "devguard_gpus": _gpus,
}


def _value(config: pytest.Config, name: str) -> Any:
    """Return the option's value, that of its twin in the ini file, or None."""
    given = getattr(getattr(config, "known_args_namespace", config.option), name, None)
    if given is not None:
        return given
    text = str(config.getini(name) or "").strip()
    if not text:
        return None
    try:
        return CHECKS[name](text)
    except ConfigError as error:
        raise pytest.UsageError(f"{name} in {config.inipath}: {error}") from None


def gpus(config: pytest.Config) -> int:
    """Return on how many simulated GPUs the run shall be; 0 for none."""
    return int(_value(config, "devguard_gpus") or 0)


def only_asks(config: pytest.Config) -> bool:
    """Tell whether this run shows something about pytest and collects nothing."""
    asked = getattr(config, "known_args_namespace", config.option)
    return any(getattr(asked, name, False) for name in _ASKING)


def read(config: pytest.Config) -> Options | None:
    """Return how tests are to be guarded; None if they are not."""
    if config.option.devguard_mode is None and os.environ.get("DEVGUARD", "").strip():
        return None
    mode = _value(config, "devguard_mode")
    single = _value(config, "devguard_doors") or {}
    if mode is None and single:
        raise pytest.UsageError("--devguard-doors needs --devguard=MODE, the mode of all other doors.")
    return None if mode in (None, "off") else Options(cast(Mode, mode), single)
