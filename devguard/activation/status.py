"""The state of devguard in this process, as plain data."""

from __future__ import annotations

import os
import sys
from typing import Any

from devguard import modes
from devguard._version import __version__
from devguard.doors import table
from devguard.ownership import in_force, unloaded
from devguard.ownership.process import process
from devguard.reporting import process_state
from devguard.reporting.journal import journal
from devguard.reporting.stray import Stray
from devguard.support import accelerator
from devguard.support.installed_torch import import_torch

__all__ = ["contexts", "owner", "status", "strays"]


def owner() -> Any:
    """Return the owner in force on this thread.

    Returns
    -------
    torch.device or None
        None outside every guard, and inside ``unguarded()``.
    """
    found = in_force.owner()
    if found is None or found.device is not None:
        return found and found.device
    return import_torch().device(found.tag)  # The environment named it; no code has entered it yet.


def strays() -> tuple[Stray, ...]:
    """Return the strays of this process so far: one record per call site, in the order of the first stray."""
    table.look("when strays() was called")
    return journal.strays()


def contexts() -> tuple[Any, ...]:
    """Return the devices on which this process holds a primary CUDA context.

    The query opens no context and does not initialise CUDA.

    Returns
    -------
    tuple of torch.device
        Empty if CUDA was never initialised.
    """
    held = accelerator.contexts()
    if not held:
        return ()
    torch = import_torch()
    return tuple(torch.device("cuda", index) for index in held)


def status() -> dict[str, Any]:
    """Return the state of devguard in this process, as plain data.

    Returns
    -------
    dict
        ``version``, ``torch`` (None if not imported), ``killed`` (``DEVGUARD=off``), ``mode`` and ``owner``
        in force on this thread, ``process_owner``, ``problem`` (why ``DEVGUARD`` is not in force), ``log`` (the file of
        ``DEVGUARD_LOG``, or why it cannot be written), ``said_by`` (the source of the process's settings), ``adoption``
        (how the environment found the owner), ``owned`` and ``contexts`` (device names), ``doors`` (per door: ``open``,
        ``mode``, problems, copies taken before it opened), ``strays`` (total), ``strays_not_kept``.
    """
    torch = sys.modules.get("torch")
    unloaded.report()
    table.look("when status() was called")
    rows = table.status()
    for name, row in rows.items():
        is_active = name not in table.ON_REQUEST or in_force.is_requested(name)
        row["mode"] = in_force.mode_of(name) if row["open"] and is_active else "off"
    return {
        "version": __version__,
        "pid": os.getpid(),
        "torch": getattr(torch, "__version__", None),
        "killed": modes.is_killed(),
        **process_state.describe(),
        "problem": process.problem,
        "log": journal.log and journal.log.where,
        "adoption": process.adoption and process.adoption.as_dict(),
        "doors": rows,
    }
