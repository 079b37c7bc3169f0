"""The environment variables by which a program is guarded that knows nothing of devguard: what they say, checked.

``DEVGUARD`` (a mode), ``DEVGUARD_DEVICE``, ``DEVGUARD_DOORS`` and ``DEVGUARD_LOG``. Nothing is put in force here: see
activation.py. It reads no device and needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from devguard import modes
from devguard.doors import table
from devguard.errors import ConfigError, DevGuardError
from devguard.modes import DoorMode, Mode
from devguard.ownership.owner import Owner, parse_owner

__all__ = ["Said", "problems", "read"]

MODES: dict[str, Mode] = {**{mode: mode for mode in modes.MODES}, "0": "off", "1": "repair"}
T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """What devguard's variables say.

    Attributes
    ----------
    mode : str or None
        None if ``DEVGUARD`` is not set, and then nothing is asked for.
    owner : Owner or None
        Of ``DEVGUARD_DEVICE``.
    doors : dict of str to str
        Of ``DEVGUARD_DOORS``: the modes of single doors.
    log : Path or None
        Of ``DEVGUARD_LOG``: the folder for the journals of all processes.
    """

    mode: Mode | None = None
    owner: Owner | None = None
    doors: dict[str, DoorMode] = field(default_factory=dict)
    log: Path | None = None


def read(environ: Mapping[str, str] | None = None) -> Said:
    """Return what the variables say.

    Raises
    ------
    ConfigError
        If any of them means nothing; it names them all, with what is valid.
    """
    said, wrong = _parse(os.environ if environ is None else environ)
    if wrong:
        raise ConfigError(" ".join(wrong))
    return said


def problems(environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the variables, one sentence each."""
    return _parse(environ)[1]


def _parse(environ: Mapping[str, str]) -> tuple[Said, list[str]]:
    wrong: list[str] = []

    def value(name: str, parse: Callable[[str], T]) -> T | None:
        text = environ.get(name, "").strip()
        if not text:
            return None
        try:
            return parse(text)
        except DevGuardError as error:
            wrong.append(str(error))
            return None

    said = Said(
        mode=value("DEVGUARD", _mode),
        owner=value("DEVGUARD_DEVICE", lambda text: parse_owner(text, "DEVGUARD_DEVICE")),
        doors=value("DEVGUARD_DOORS", parse_doors) or {},
        log=value("DEVGUARD_LOG", _log),
    )
    return said, wrong


def _mode(text: str) -> Mode:
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
        Where it came from, for the message.

    Raises
    ------
    ConfigError
        If it cannot be read, or names a door or a mode that does not exist.
    """
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    if not all("=" in pair for pair in pairs):
        raise ConfigError(f"{what}={text!r} cannot be read. Valid: door=mode, with commas, as in load=warn.")
    modes = {name.strip(): mode.strip() for name, _, mode in (pair.partition("=") for pair in pairs)}
    try:
        return table.check_doors(modes)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _log(text: str) -> Path:
    path = Path(os.path.abspath(text))
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"DEVGUARD_LOG={text!r} is not a directory. Name a directory; it is made if it does not exist."
        )
    return path
