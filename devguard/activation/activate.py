"""Activation by environment variables, for a program that does not use devguard itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from devguard.activation import environment
from devguard.activation.environment import Settings
from devguard.activation.install import uninstall
from devguard.doors import table
from devguard.errors import DeviceResolutionError
from devguard.ownership import siblings
from devguard.ownership.adoption import Adoption
from devguard.ownership.owner import Owner, owner_of_index
from devguard.ownership.prepare import ModeOf, on_prepare
from devguard.ownership.process import BY_ENVIRONMENT, INSTALLED, process, unguarded_contexts
from devguard.ownership.resolve import has_local_siblings, is_one_visible, owner_from_environment
from devguard.reporting import allowlist
from devguard.support import accelerator, context_check, process_exit
from devguard.support.forks import opening

__all__ = ["activate"]


def activate(environ: Mapping[str, str] | None = None) -> bool:
    """Apply ``DEVGUARD``, ``DEVGUARD_DEVICE``, ``DEVGUARD_DOORS`` and ``DEVGUARD_LOG``.

    If no device is named, the owner comes later: from an integration that knows the role of the process, or as
    adoption.py describes. An ``install()`` of the program stays in force. Initialises no CUDA, and opens no context.

    Parameters
    ----------
    environ : mapping, optional
        The environment; ``os.environ`` by default.

    Returns
    -------
    bool
        Whether ``DEVGUARD`` sets a mode other than ``off``, and the program has not called ``install()``.

    Raises
    ------
    ConfigError
        If a variable is not valid.
    DeviceResolutionError
        If a variable names a device that this process does not see.
    """
    environ = os.environ if environ is None else environ
    settings = environment.read(environ)
    if settings.mode in (None, "off") or process.source == INSTALLED:
        return False
    with opening:
        try:
            table.open_all()
            if process.mode is None:  # Otherwise the parent process has set it, and knew more than the environment.
                process.configure(settings.mode, settings.doors, BY_ENVIRONMENT)
            if process.owner is None:
                _adopt(settings, environ)
                process.restart_with(lambda: _adopt_again(settings, environ))
            context_check.follow(process.mode_of(""))
        except BaseException:
            uninstall()
            raise
    siblings.watch_forks()
    if _yield_to not in on_prepare:
        on_prepare.append(_yield_to)
    process_exit.register(_look_at_end)
    return True


def _adopt(settings: Settings, environ: Mapping[str, str], child: bool | None = None) -> None:
    """Set the owner of this process that the environment names, or the first candidate."""
    several = has_local_siblings(environ)
    if child is None:
        # The launcher's variables describe the parent of a child, and a child does not inherit an owner.
        child = siblings.is_child()
    owner, source, firm, pin, rank = None, "nothing yet", False, False, None
    if settings.owner is not None:
        owner, _ = owner_from_environment(environ)  # also checks that it is one device for one process
        _check_visible(owner)
        source, firm, pin = "DEVGUARD_DEVICE", not child, not child
    elif accelerator.device_count() == 0:
        source = "no GPU is visible"
    elif is_one_visible(environ):
        owner, source, firm = owner_of_index(0), "CUDA_VISIBLE_DEVICES", True
    elif several and not child:
        owner, _ = owner_from_environment(environ)
        rank, source, pin = owner, "the launcher's local rank", True
    elif several:
        with contextlib.suppress(DeviceResolutionError):  # The child may see fewer GPUs than its rank.
            rank, _ = owner_from_environment(environ)
    found = Adoption(process, source, firm=firm, pin=pin, several=several, rank=rank, is_accounted=_is_accounted)
    process.own(owner, found)


def _is_accounted(index: int) -> bool:
    """Return whether the program may use a GPU besides its own."""
    return index in unguarded_contexts or f"cuda:{index}" in allowlist.allowances()


def _yield_to(other: Owner, mode_of: ModeOf) -> None:
    """Let a guess yield to the owner of a guard."""
    if process.adoption is not None:
        process.adoption.yield_to(other)


def _adopt_again(settings: Settings, environ: Mapping[str, str]) -> None:
    """Adopt an owner in a forked child, which `multiprocessing` has not marked as a child yet."""
    _adopt(settings, environ, child=True)
    process_exit.register(_look_at_end)


def _check_visible(owner: Owner | None) -> None:
    if owner is not None and owner.index >= accelerator.device_count():
        raise accelerator.out_of_range("DEVGUARD_DEVICE", owner.index)


def _look_at_end() -> None:
    """Look for contexts a last time, for the log, and report a process that had no owner."""
    if process.adoption is not None:
        table.look("at the end of the process")
        process.adoption.report_unguarded()
