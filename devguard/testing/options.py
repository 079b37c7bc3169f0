"""Reads and checks the options of the pytest plugin.

The command line overrides ``DEVGUARD`` in the environment, which overrides the ini file: if DEVGUARD is set and
``--devguard`` is not given, the plugin does nothing.
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

__all__ = ["CHECKS", "gpus", "is_query", "Options", "read"]

_QUERIES = ("help", "version", "markers", "cacheshow")


class Options(NamedTuple):
    """How tests are guarded.

    Attributes
    ----------
    mode : str
        What the doors do with a stray.
    doors : dict of str to str
        The mode of individual doors.
    """

    mode: Mode
    doors: dict[str, DoorMode]


def _check_gpus(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > MAX_GPUS:
        raise ConfigError(
            f"{text!r} is not a valid number of simulated GPUs: give a number from 1 to {MAX_GPUS}, or 0 for none."
        )
    return int(text)


CHECKS: dict[str, Callable[[str], Any]] = {
    "devguard_mode": modes.check_mode,
    "devguard_doors": lambda text: environment.parse_doors(text, "--devguard-doors"),
    "devguard_gpus": _check_gpus,
}


def _value(config: pytest.Config, name: str) -> Any:
    """Return the value of an option, from the command line or else the ini file; None if it is not set."""
    value = getattr(getattr(config, "known_args_namespace", config.option), name, None)
    if value is not None:
        return value
    text = str(config.getini(name) or "").strip()
    if not text:
        return None
    try:
        return CHECKS[name](text)
    except ConfigError as error:
        raise pytest.UsageError(f"{name} in {config.inipath}: {error}") from None


def gpus(config: pytest.Config) -> int:
    """Return the number of simulated GPUs for this run; 0 for none."""
    return int(_value(config, "devguard_gpus") or 0)


def is_query(config: pytest.Config) -> bool:
    """Return whether this run only prints information about pytest and collects no tests."""
    arguments = getattr(config, "known_args_namespace", config.option)
    return any(getattr(arguments, name, False) for name in _QUERIES)


def read(config: pytest.Config) -> Options | None:
    """Return how to guard the tests; None if they are not guarded."""
    if config.option.devguard_mode is None and os.environ.get("DEVGUARD", "").strip():
        return None
    mode = _value(config, "devguard_mode")
    doors = _value(config, "devguard_doors") or {}
    if mode is None and doors:
        raise pytest.UsageError("--devguard-doors needs --devguard=MODE, the mode of all other doors.")
    return None if mode in (None, "off") else Options(cast(Mode, mode), doors)
