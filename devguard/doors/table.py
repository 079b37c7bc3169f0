"""The table of doors, and how they are opened and closed together.

A door is one way by which work gets onto a device that is not the owner's, and one module here. Each module
has the same small shape:

- ``install()`` patches torch, or raises `DoorError` if this torch has not what it needs;
- ``uninstall()`` restores exactly what it found, and returns the names that somebody else patched over us
  meanwhile;
- ``status()`` returns plain data for ``devguard.status()``.

An open door is inert where no owner is in force. A door never imports another door.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from devguard.errors import ConfigError
from devguard.modes import MODES, DoorMode, killed
from devguard.ownership.process import process
from devguard.reporting.journal import journal
from devguard.support import accelerator
from devguard.support.callsite import Origin
from devguard.support.patching import DoorError

__all__ = [
    "accept_contexts",
    "check_doors",
    "close_all",
    "DOORS",
    "EXTRA_MODES",
    "inspect",
    "look",
    "NAMES",
    "ON_REQUEST",
    "open_all",
    "status",
]

# name of the door = name of its module -> the family that the module lies in; they are opened in this order
DOORS = {
    "artefacts": "arrivals",
    "bare_cuda": "arrivals",
    "bookkeeping": "current_device",
    "buffers": "arrivals",
    "children": "concurrency",
    "collectives": "current_device",
    "first_touch": "contexts",
    "interop": "arrivals",
    "ipc": "arrivals",
    "jit": "arrivals",
    "load": "arrivals",
    "native": "contexts",
    "set_device": "current_device",
    "streams": "current_device",
    "threads": "concurrency",
    "triton": "current_device",
    "visibility": "contexts",
}
NAMES = tuple(DOORS)
# doors that act only inside remap() or where doors= names them
ON_REQUEST = frozenset({"buffers"})
# modes that single doors know beyond those of all
EXTRA_MODES: dict[str, tuple[DoorMode, ...]] = {"ipc": ("copy", "uuid")}

_lock = threading.RLock()
_open: dict[str, ModuleType] = {}
_failed: dict[str, str] = {}


def check_doors(doors: object) -> dict[str, DoorMode]:
    """Return per-door modes as a dictionary of valid values.

    Parameters
    ----------
    doors : mapping of str to str
        The mode of each named door, such as ``{"load": "warn"}``.

    Raises
    ------
    ConfigError
        For a door or a mode that does not exist.
    """
    if not isinstance(doors, Mapping):
        raise ConfigError(f"doors must map door names to modes, such as {{'load': 'warn'}}; got {doors!r}.")
    checked: dict[str, DoorMode] = {}
    for name, mode in doors.items():
        if name not in DOORS:
            raise ConfigError(f"there is no door {name!r}. Doors: {', '.join(DOORS)}.")
        valid = (*MODES, *EXTRA_MODES.get(name, ()))
        if mode not in valid:
            raise ConfigError(f"door {name!r}: {mode!r} is not a mode. Valid modes: {', '.join(valid)}.")
        checked[name] = mode
    return checked


def open_all() -> None:
    """Open every door that is not open. ``DEVGUARD=off`` keeps them all closed."""
    if len(_open) + len(_failed) == len(NAMES) or killed():
        return
    accelerator.torch_module()
    with _lock:
        for name in NAMES:
            if name in _open or name in _failed:
                continue
            module = importlib.import_module(f"{__package__}.{DOORS[name]}.{name}")
            try:
                module.install()
            except Exception as error:
                module.uninstall()  # what it had patched before it met what is missing
                if not isinstance(error, DoorError):
                    raise
                _failed[name] = str(error)
            else:
                _open[name] = module
        _start_log()


def _start_log() -> None:
    """Write the journal to a file from now on, where ``DEVGUARD_LOG`` names a folder."""
    folder = os.environ.get("DEVGUARD_LOG", "").strip()
    if folder and journal.log is None:  # importing torch may have opened everything meanwhile
        from devguard.reporting import log_file

        log_file.start(Path(os.path.abspath(folder)), last_look=look)


def close_all() -> list[str]:
    """Close every open door, the last one first; return the names that somebody else patched over ours."""
    left_over: list[str] = []
    with _lock:
        if journal.log is not None:
            journal.log.stop()
        while _open:
            _, module = _open.popitem()
            left_over += module.uninstall()
        _failed.clear()
    return left_over


def accept_contexts() -> None:
    """Hold nobody responsible for the contexts that there are now."""
    native = _open.get("native")
    if native is not None:
        native.accept()


def inspect(where: str, asked_by: Origin | None = None) -> None:
    """Look for contexts that no door explains; nothing if the doors are closed.

    Parameters
    ----------
    where : str
        What has just happened.
    asked_by : Origin, optional
        The call site of a context whose line is not known; the line that asks, by default.
    """
    native = _open.get("native")
    if native is not None:
        native.inspect(where, asked_by)


def look(where: str) -> None:
    """Look for contexts on devices that this process does not own: now, and not only at the next door.

    Parameters
    ----------
    where : str
        What has just happened, for the record.
    """
    if process.adoption is not None:
        process.adoption.check_contexts()
    inspect(where)


def status() -> dict[str, dict[str, Any]]:
    """Return, for each door, whether it is open and what it has to say."""
    with _lock:
        report: dict[str, dict[str, Any]] = {}
        for name in NAMES:
            module = _open.get(name)
            row: dict[str, Any] = {"open": module is not None}
            if module is not None:
                row.update(module.status())
            if name in _failed:
                row["problem"] = _failed[name]
            report[name] = row
        return report
