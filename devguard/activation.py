"""Switching devguard on and off for a whole process, and saying how it stands.

``install`` gives every thread of the process an owner where no guard is in force. ``uninstall`` leaves
torch as it was found.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from devguard import accelerator, owners, scope, settings, verdict
from devguard import doors as door_table
from devguard._version import __version__
from devguard.journal import journal
from devguard.settings import DEFAULT_MODE, DoorMode, Mode
from devguard.stray import Stray

__all__ = ["contexts", "install", "owner", "status", "strays", "uninstall"]

_lock = threading.Lock()


def install(mode: Mode = DEFAULT_MODE, device: Any = None, *, doors: Mapping[str, DoorMode] | None = None) -> None:
    """Make a device the owner of this whole process, and open the doors.

    The current device of the calling thread becomes the owner's. A guard inside has precedence. Calling it
    again replaces what the first call said.

    Parameters
    ----------
    mode : {'off', 'observe', 'warn', 'repair', 'error'}
        What the doors do with a stray where no scope says otherwise.
    device : int, str or torch.device, optional
        The owner. Left out, it is ``DEVGUARD_DEVICE``, else the launcher's local rank, else the enclosing
        guard's.
    doors : mapping of str to str, optional
        The mode of single doors.

    Raises
    ------
    ConfigError
        For a mode or a door that does not exist.
    DeviceResolutionError
        If nothing names a device, or if this process does not see it.
    """
    checked = settings.check_mode(mode)
    checked_doors = {} if doors is None else settings.check_doors(doors, door_table.NAMES, door_table.EXTRA_MODES)
    if device is not None:
        owner = owners.parse(device)
    else:
        found, looked = owners.from_environment()
        owner_or_none = found or scope.current_owner()
        if owner_or_none is None:
            raise owners.not_found(looked)
        owner = owner_or_none
    with _lock:
        door_table.open_all()
        scope.prepare(owner, lambda door: checked_doors.get(door, checked))
        scope.process.owner, scope.process.mode, scope.process.doors = owner, checked, checked_doors
        accelerator.set_torchs_own_check(checked)
        if owner.index >= 0 and not scope.local.stack:
            scope.local.stack.take(owner.index)


def uninstall() -> list[str]:
    """Close every door, forget the process's owner, and leave torch as it was found.

    Scopes that are still entered go on to set devices. A guard entered later opens the doors again.

    Returns
    -------
    list of str
        The names that somebody else patched over devguard, which stay as they are; normally empty.
    """
    with _lock:
        left = door_table.close_all()
        scope.forget()
        scope.process.reset()
        verdict.forget_allowed()
        accelerator.restore_torchs_own_check()
    return left


def owner() -> Any:
    """Return the owner in force on this thread.

    Returns
    -------
    torch.device or None
        None outside every guard, and inside ``unguarded()``.
    """
    found = scope.current_owner()
    return None if found is None else found.device


def strays() -> tuple[Stray, ...]:
    """Return what strayed in this process so far: one record per call site, in the order of their first time."""
    door_table.inspect("when strays() was asked")
    return journal.strays()


def contexts() -> tuple[Any, ...]:
    """Return the devices on which this process holds a primary CUDA context.

    Asking opens none and does not initialise CUDA.

    Returns
    -------
    tuple of torch.device
        Empty where CUDA was never initialised.
    """
    held = accelerator.contexts()
    if not held:
        return ()
    torch = accelerator.torch_module()
    return tuple(torch.device("cuda", index) for index in held)


def status() -> dict[str, Any]:
    """Return how devguard stands in this process, as plain data.

    Returns
    -------
    dict
        ``version``, ``torch`` (None if not imported), ``killed`` (``DEVGUARD=off``), ``mode`` and ``owner``
        in force on this thread, ``process_owner``, ``owned`` and ``contexts`` (device names), ``doors``
        (per door: ``open``, ``mode``, problems, copies taken before it opened), ``strays`` (total),
        ``strays_not_kept``.
    """
    torch = sys.modules.get("torch")
    in_force = scope.current_owner()
    door_table.inspect("when status() was asked")
    rows = door_table.status()
    for name, row in rows.items():
        asked = name not in door_table.ON_REQUEST or scope.asked(name)
        row["mode"] = scope.mode_of(name) if row["open"] and asked else "off"
    return {
        "version": __version__,
        "pid": os.getpid(),
        "torch": getattr(torch, "__version__", None),
        "killed": settings.killed(),
        "mode": scope.mode_of(""),
        "owner": in_force and in_force.tag,
        "process_owner": scope.process.owner and scope.process.owner.tag,
        "owned": owners.owned(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
        "doors": rows,
        "strays": journal.total,
        "strays_not_kept": journal.dropped,
    }
