"""The table of doors, and how they are opened and closed together.

A door is one module ``doors/<family>/<door>.py``, which imports no other door. To add one, write the module, its line
in `DOORS`, its section in docs/doors.md and its tests. The module defines ``NAME``, ``_patches = Patches()`` and:

- ``install()``: replaces functions through ``_patches``; raises `DoorError` if one is missing. Each replacement reads
  ``in_force.owner_at_door()``, calls the original if there is no owner, and passes a stray to ``verdict.judge``.
- ``uninstall()``: restores what ``install()`` found, even if that failed halfway, and returns the names that other code
  has patched since (``_patches.restore()`` does both).
- ``status()``: plain data for ``devguard.status()``. Variables of the door lie in one ``_State`` object.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from devguard.errors import ConfigError
from devguard.modes import MODES, DoorMode, is_killed
from devguard.ownership import in_force
from devguard.ownership.process import process
from devguard.reporting import child_ends
from devguard.reporting.journal import journal
from devguard.support import callsite, log_folder
from devguard.support.callsite import Origin
from devguard.support.forks import opening
from devguard.support.installed_torch import import_torch
from devguard.support.patching import DoorError
from devguard.support.strictness import report_off

__all__ = [
    "accept_contexts",
    "check_doors",
    "close_all",
    "DOORS",
    "EXTRA_MODES",
    "inspect",
    "is_open",
    "look",
    "NAMES",
    "ON_REQUEST",
    "open_all",
    "status",
]

# Door, which is also the name of its module -> family, the package of the module. Doors are opened in this order.
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
# Doors that act only inside remap(), or where doors= names them.
ON_REQUEST = frozenset({"buffers"})
# Modes that single doors accept in addition to those of every door.
EXTRA_MODES: dict[str, tuple[DoorMode, ...]] = {"ipc": ("copy", "uuid")}

_open: dict[str, ModuleType] = {}
_failed: dict[str, str] = {}


class _Stage:
    """How far the doors are open.

    Attributes
    ----------
    complete : bool
        Whether every door was opened, or has failed.
    dirty : bool
        Whether a call of `open_all` or `close_all` has begun and has not ended.
    """

    def __init__(self) -> None:
        self.complete = self.dirty = False


_stage = _Stage()


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
    """Open each door that is not open and has not failed; with ``DEVGUARD=off``, open none."""
    if _stage.complete or is_killed():
        return
    import_torch()
    with opening:
        # By another thread; or by this one, below a signal handler (a flag could be left behind by an interrupt).
        if _stage.complete or callsite.runs(sys._getframe(1), open_all.__code__):
            return
        try:
            if _stage.dirty:  # the last call was interrupted, and so was the removal of its doors
                close_all()
            _stage.dirty = True
            for name in NAMES:
                _open_door(name)
            _start_log()
            in_force.close_doors(False)
            _stage.complete = True
            _stage.dirty = False
        except BaseException:  # all doors or none: the next call must find no half-opened door
            close_all()
            raise
        failed = dict(_failed)
    for name, problem in failed.items():
        report_off(f"devguard: the door {name} stays closed in this process: {problem}")


def _open_door(name: str) -> None:
    module = importlib.import_module(f"{__package__}.{DOORS[name]}.{name}")
    _open[name] = module  # First, so that an interrupted door is closed again.
    try:
        module.install()
    except DoorError as error:
        module.uninstall()  # removes the patches from before the failure
        _failed[name] = str(error)
        del _open[name]


def _start_log() -> None:
    """Start the log file, if ``DEVGUARD_LOG`` names a folder."""
    folder = log_folder.locate()
    if folder is not None and journal.log is None:  # importing torch may have started it already
        from devguard.reporting import log_file

        log_file.start(folder, last_look=look)


def close_all() -> list[str]:
    """Close every open door, the last one first; return the names that other code has patched since."""
    left_over: list[str] = []
    with opening:
        if journal.log is not None:
            journal.log.stop()
        left_over += child_ends.unwatch()
        in_force.close_doors(True)
        _stage.dirty, _stage.complete = True, False
        while _open:
            name, module = next(reversed(_open.items()))
            try:
                left_over += module.uninstall()
            except Exception as error:  # noqa: BLE001 - the other doors must close
                left_over.append(f"the door {name} ({type(error).__name__}: {error})")
            del _open[name]  # Last, so that a second call goes on after an interrupt.
        _failed.clear()
        _stage.dirty = False
    return left_over


def accept_contexts(devices: Iterable[int] | None = None) -> None:
    """Accept the contexts that exist now, or contexts on `devices`: the door ``native`` does not report them."""
    native = _open.get("native")
    if native is not None:
        native.accept(devices)


def is_open(name: str) -> bool:
    """Return whether a door is open."""
    return name in _open


def inspect(where: str, origin: Origin | None = None) -> None:
    """Look for contexts that no door explains; do nothing if the doors are closed.

    Parameters
    ----------
    where : str
        What has just happened, for the record.
    origin : Origin, optional
        The call site to record for a context of unknown origin; by default, the line that caused the look.
    """
    native = _open.get("native")
    if native is not None:
        if process.adoption is not None and process.adoption.firm:
            process.adoption.check_contexts()  # a named owner is owned before its first entry
        native.inspect(where, origin)


def look(where: str) -> None:
    """Look for contexts on devices that this process does not own, without waiting for the next door.

    Parameters
    ----------
    where : str
        What has just happened, for the record.
    """
    if process.adoption is not None:
        process.adoption.check_contexts()
    inspect(where)
    journal.note_state()


def status() -> dict[str, dict[str, Any]]:
    """Return for each door whether it is open, its own status, and why it could not be opened."""
    with opening:
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
