"""Activation by environment, for a program that does not use devguard itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from devguard.activation import environment
from devguard.activation.environment import Said
from devguard.doors import table
from devguard.ownership import adoption
from devguard.ownership.adoption import Adoption
from devguard.ownership.owner import Owner, owner_of_index
from devguard.ownership.process import process
from devguard.ownership.resolve import is_one_of_several, owner_from_environment
from devguard.support import accelerator, process_exit

__all__ = ["activate"]

from devguard.activation.install import BY_ENVIRONMENT, INSTALLED, lock, uninstall


def activate(environ: Mapping[str, str] | None = None) -> bool:
    """Put in force what ``DEVGUARD``, ``DEVGUARD_DEVICE``, ``DEVGUARD_DOORS`` and ``DEVGUARD_LOG`` say.

    Without a device it waits for the owner to become known: from an integration that knows the process's role, or as
    adoption.py says. What the program itself has installed stays in force. Initialises no CUDA, and opens no context.

    Parameters
    ----------
    environ : mapping, optional
        The environment; ``os.environ`` by default.

    Returns
    -------
    bool
        Whether the environment asks for a guard, and the program has not installed one itself.

    Raises
    ------
    ConfigError
        If a variable means nothing.
    DeviceResolutionError
        If a variable names a device that this process does not see.
    """
    environ = os.environ if environ is None else environ
    said = environment.read(environ)
    if said.mode in (None, "off") or process.source == INSTALLED:
        return False
    with lock:
        try:
            table.open_all()
            if process.mode is None:  # else a parent that was told more has said it
                process.configure(said.mode, said.doors, BY_ENVIRONMENT)
            if process.owner is None:
                _adopt(said, environ)
                process.restart = lambda: _adopt_again(said, environ)
            accelerator.set_torchs_own_check(process.mode_of(""))
        except Exception:
            uninstall()
            raise
    process_exit.register(_at_end)
    return True


def _adopt(said: Said, environ: Mapping[str, str], child: bool | None = None) -> None:
    """Let this process adopt the owner, or the first candidate for it, that the environment names."""
    several = is_one_of_several(environ)
    if child is None:
        child = adoption.is_child()  # what a launcher says is said to its parent, and an owner is not inherited
    if said.owner is not None:
        owner, _ = owner_from_environment(environ)  # which checks that it is one device for one process
        _check_visible(owner)
        process.own(owner, Adoption(process, "DEVGUARD_DEVICE", firm=not child, pin=not child, several=several))
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    owner, source, firm, pin = None, "nothing yet", False, False
    if accelerator.device_count() == 0:
        source = "no GPU is visible"
    elif visible and "," not in visible and visible != "-1":
        owner, source, firm = owner_of_index(0), "CUDA_VISIBLE_DEVICES", True
    elif several and not child:
        owner, _ = owner_from_environment(environ)
        source, pin = "the launcher's local rank", True
    process.own(owner, Adoption(process, source, firm=firm, pin=pin, several=several))


def _adopt_again(said: Said, environ: Mapping[str, str]) -> None:
    _adopt(said, environ, child=True)  # multiprocessing does not say so yet
    process_exit.register(_at_end)


def _check_visible(owner: Owner | None) -> None:
    if owner is not None and owner.index >= accelerator.device_count():
        raise accelerator.out_of_range("DEVGUARD_DEVICE", owner.index)


def _at_end() -> None:
    """Look at the contexts a last time, for the log."""
    if process.adoption is not None:
        table.look("at the end of the process")
