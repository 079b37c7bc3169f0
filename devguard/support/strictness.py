"""``DEVGUARD_STRICT``: whether a process may go on without the guard that its environment asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping

from devguard.errors import ConfigError
from devguard.support.notices import alert, flush

__all__ = ["is_strict", "parse_strict", "report_off", "STATUS", "VARIABLE"]

VARIABLE = "DEVGUARD_STRICT"
VALUES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
STATUS = 2  # the exit status for bad configuration, as that of the commands


def parse_strict(text: str) -> bool:
    """Return whether `text`, the value of the variable, ends a process without its guard.

    Raises
    ------
    ConfigError
        If it is not valid.
    """
    found = VALUES.get(text.strip().lower())
    if found is None:
        raise ConfigError(f"{VARIABLE}={text!r} is not valid. Valid: 1 (end a process without its guard) or 0.")
    return found


def is_strict(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether the variable has a valid value that is true."""
    text = (os.environ if environ is None else environ).get(VARIABLE, "")
    return VALUES.get(text.strip().lower(), False)


def report_off(text: str) -> None:
    """Report a guard that is off although it was asked for (`notices.alert`); if the process is strict, end it.

    The process ends without its exit handlers, because an exception could be caught, in a thread or around an import.
    """
    if not is_strict():
        alert(text)
        return
    alert(f"{text} This process ends here, because {VARIABLE}={os.environ[VARIABLE]}.")
    flush()
    os._exit(STATUS)
