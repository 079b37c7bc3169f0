"""The settings in devguard's environment variables, read and checked; they guard a program that does not use devguard.

The variables are ``DEVGUARD`` (a mode), ``DEVGUARD_DEVICE``, ``DEVGUARD_DOORS``, ``DEVGUARD_LOG`` and
``DEVGUARD_STRICT``; activate.py applies them. ``DEVGUARD_TRANSPORT`` and ``DEVGUARD_TRANSPORT_BUDGET`` are for
integrations. This module reads no device and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from devguard import modes
from devguard.doors import table
from devguard.errors import ConfigError, DevGuardError
from devguard.modes import DoorMode, Mode
from devguard.ownership.owner import Owner, parse_owner
from devguard.support import strictness
from devguard.support.sizes import is_budget, parse_size

__all__ = ["DEFAULT_BUDGET", "find_problems", "parse_doors", "parse_transport", "read", "Settings"]

Transport = Literal["host", "off"]

DEFAULT_BUDGET = 1 << 30  # bytes
TRANSPORTS: dict[str, Transport] = {"host": "host", "off": "off", "0": "off"}
MODES: dict[str, Mode] = {**{mode: mode for mode in modes.MODES}, "0": "off", "1": "repair"}
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The settings in devguard's variables.

    Attributes
    ----------
    mode : str or None
        ``DEVGUARD``; None if it is not set, and then the other settings have no effect.
    owner : Owner or None
        ``DEVGUARD_DEVICE``.
    doors : dict of str to str
        ``DEVGUARD_DOORS``: the modes of single doors.
    log : Path or None
        ``DEVGUARD_LOG``: the folder for the journals of all processes.
    is_strict : bool
        ``DEVGUARD_STRICT``: whether a process ends where its guard cannot be in force.
    transport : str
        ``DEVGUARD_TRANSPORT``: how a framework's tensors travel; ``"off"``: as the framework sends them.
    budget : int
        ``DEVGUARD_TRANSPORT_BUDGET``: the most bytes of an arena, in each process that sends.
    """

    mode: Mode | None = None
    owner: Owner | None = None
    doors: dict[str, DoorMode] = field(default_factory=dict)
    log: Path | None = None
    is_strict: bool = False
    transport: Transport = "off"
    budget: int = DEFAULT_BUDGET


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings in the variables.

    Raises
    ------
    ConfigError
        If a variable is not valid; the message names all such variables, and the valid values.
    """
    settings, wrong = _parse(os.environ if environ is None else environ)
    if wrong:
        raise ConfigError(" ".join(wrong))
    return settings


def find_problems(environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the variables, one sentence each."""
    return _parse(environ)[1]


def _parse(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    wrong: list[str] = []

    def parsed(name: str, parse: Callable[[str], T]) -> T | None:
        text = environ.get(name, "").strip()
        if not text:
            return None
        try:
            return parse(text)
        except DevGuardError as error:
            wrong.append(str(error))
            return None

    settings = Settings(
        mode=parsed("DEVGUARD", _parse_mode),
        owner=parsed("DEVGUARD_DEVICE", lambda text: parse_owner(text, "DEVGUARD_DEVICE")),
        doors=parsed("DEVGUARD_DOORS", parse_doors) or {},
        log=parsed("DEVGUARD_LOG", _parse_folder),
        is_strict=parsed(strictness.VARIABLE, strictness.parse_strict) or False,
        transport=parsed("DEVGUARD_TRANSPORT", parse_transport) or "off",
        budget=parsed("DEVGUARD_TRANSPORT_BUDGET", _parse_budget) or DEFAULT_BUDGET,
    )
    return settings, wrong


def _parse_mode(text: str) -> Mode:
    mode = MODES.get(text.lower())
    if mode is None:
        raise ConfigError(f"DEVGUARD={text!r} is not a mode. Valid: {', '.join(MODES)}.")
    return mode


def parse_doors(text: str, what: str = "DEVGUARD_DOORS") -> dict[str, DoorMode]:
    """Return the modes of single doors, as written in one line: ``ipc=error,threads=off``.

    Parameters
    ----------
    text : str
        Pairs ``door=mode``, separated by commas.
    what : str
        The source of the text, for the message.

    Raises
    ------
    ConfigError
        If `text` is malformed, or names a door or a mode that does not exist.
    """
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    if not all("=" in pair for pair in pairs):
        raise ConfigError(f"{what}={text!r} cannot be read. Valid: door=mode, separated by commas, as in load=warn.")
    modes = {name.strip(): mode.strip() for name, _, mode in (pair.partition("=") for pair in pairs)}
    try:
        return table.check_doors(modes)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _parse_folder(text: str) -> Path:
    path = Path(os.path.abspath(text))
    if os.path.exists(path) and not os.path.isdir(path):  # These raise for no path, however long it is.
        raise ConfigError(
            f"DEVGUARD_LOG={text!r} is not a directory. Name a directory; devguard creates it if it does not exist."
        )
    return path


def parse_transport(text: str, what: str = "DEVGUARD_TRANSPORT") -> Transport:
    """Return how a framework's tensors travel: ``"host"``, through devguard.transport; ``"off"``, as it sends them.

    Raises
    ------
    ConfigError
        If `text` is not valid.
    """
    found = text.lower()
    if found not in TRANSPORTS:
        raise ConfigError(f"{what}={text!r} is not a transport. Valid: {', '.join(TRANSPORTS)}.")
    return TRANSPORTS[found]


def _parse_budget(text: str) -> int:
    size = parse_size(text)
    if not is_budget(size):
        raise ConfigError(
            f"DEVGUARD_TRANSPORT_BUDGET={text!r} is not a budget. Valid: a size such as 1GiB or 512M, at least 64K."
        )
    return size
