"""Switching devguard on and off for a whole process, and saying how it stands.

``install`` gives every thread of the process an owner where no guard is in force. ``activate`` does it by environment,
for a program that knows nothing of devguard; ``assign``, for an integration that knows what the process is.
``uninstall`` leaves torch as it was found.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from devguard import (
    accelerator,
    adoption,
    autoload,
    ending,
    environment,
    integrations,
    owners,
    scope,
    settings,
    verdict,
)
from devguard import doors as door_table
from devguard._version import __version__
from devguard.environment import Said
from devguard.journal import journal
from devguard.settings import DEFAULT_MODE, DoorMode, Mode
from devguard.stray import Stray

__all__ = ["activate", "assign", "contexts", "install", "owner", "status", "strays", "uninstall"]

_lock = threading.RLock()  # importing torch inside it may activate devguard

INSTALLED = "install"  # who said what is in force
BY_ENVIRONMENT = "environment"


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
    _own(owner, checked, checked_doors, INSTALLED)


def assign(device: Any, *, role: str) -> bool:
    """Make a device the owner of this process, because of what the process is; for integrations.

    The mode and the modes of single doors stay as the environment or the parent process says. What the program itself
    has installed stays in force.

    Parameters
    ----------
    device : int, str or torch.device
        The owner.
    role : str
        What this process is, such as ``"SGLang scheduler TP1"``; shown by ``status()``.

    Returns
    -------
    bool
        Whether the device owns this process now; False where the program's own ``install()`` stays in force.

    Raises
    ------
    DeviceResolutionError
        If this process does not see the device.
    """
    process = scope.process
    if process.said_by == INSTALLED and process.owner is not None:  # a forked child has left its owner behind
        return False
    said = environment.read()
    _own(owners.parse(device, role), process.mode or said.mode or DEFAULT_MODE, dict(process.doors) or said.doors, role)
    return True


def _own(owner: owners.Owner, mode: Mode, doors: dict[str, DoorMode], said_by: str) -> None:
    """Make `owner` the firm owner of this process."""
    process = scope.process
    accelerator.torch_module()  # before the lock, which torch's own loading of devguard takes
    with _lock:
        door_table.open_all()
        scope.prepare(owner, lambda door: doors.get(door, mode))
        process.owner, process.mode, process.doors = owner, mode, doors
        process.said_by, process.adoption = said_by, None
        accelerator.set_torchs_own_check(mode)
        if owner.index >= 0 and not scope.local.stack:
            scope.local.stack.take(owner.index)


def activate(environ: Mapping[str, str] | None = None) -> None:
    """Put in force what ``DEVGUARD``, ``DEVGUARD_DEVICE``, ``DEVGUARD_DOORS`` and ``DEVGUARD_LOG`` say.

    Without a device it waits for the owner to become known: from an integration that knows the process's role, or as
    adoption.py says. What the program itself has installed stays in force. Initialises no CUDA, and opens no context.

    Parameters
    ----------
    environ : mapping, optional
        The environment; ``os.environ`` by default.

    Raises
    ------
    ConfigError
        If a variable means nothing.
    DeviceResolutionError
        If a variable names a device that this process does not see.
    """
    environ = os.environ if environ is None else environ
    said = environment.read(environ)
    process = scope.process
    if said.mode in (None, "off") or process.said_by == INSTALLED:
        return
    with _lock:
        try:
            door_table.open_all()
            if process.mode is None:  # else a parent that was told more has said it
                process.mode, process.doors, process.said_by = said.mode, said.doors, BY_ENVIRONMENT
            if process.owner is None:
                process.adoption = _adopt(said, environ)
                process.restart = lambda: _adopt_again(said, environ)
            accelerator.set_torchs_own_check(process.mode_of(""))
            integrations.arm()
        except Exception:
            uninstall()
            raise
    ending.at_end(_at_end)


def _adopt(said: Said, environ: Mapping[str, str], child: bool | None = None) -> adoption.Adoption:
    """Find the owner of this process, or the first candidate for it, in the environment."""
    several = owners.several(environ)
    if child is None:
        child = adoption.is_child()  # what a launcher says is said to its parent, and an owner is not inherited
    if said.owner is not None:
        owner, _ = owners.from_environment(environ)  # which checks that it is one device for one process
        _check_visible(owner)
        return adoption.Adoption(owner, "DEVGUARD_DEVICE", firm=not child, pin=not child, several=several)
    if accelerator.device_count() == 0:
        return adoption.Adoption(None, "no GPU is visible", firm=False, pin=False, several=several)
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if visible and "," not in visible and visible != "-1":
        return adoption.Adoption(owners.of_index(0), "CUDA_VISIBLE_DEVICES", firm=True, pin=False, several=several)
    if several and not child:
        owner, _ = owners.from_environment(environ)
        return adoption.Adoption(owner, "the launcher's local rank", firm=False, pin=True, several=True)
    return adoption.Adoption(None, "nothing yet", firm=False, pin=False, several=several)


def _adopt_again(said: Said, environ: Mapping[str, str]) -> None:
    scope.process.adoption = _adopt(said, environ, child=True)  # multiprocessing does not say so yet
    ending.at_end(_at_end)


def _check_visible(owner: owners.Owner | None) -> None:
    if owner is not None and owner.index >= accelerator.device_count():
        raise accelerator.out_of_range("DEVGUARD_DEVICE", owner.index)


def _at_end() -> None:
    """Look at the contexts a last time, for the log."""
    if scope.process.adoption is not None:
        _look("at the end of the process")


def uninstall() -> list[str]:
    """Close every door, forget the process's owner, and leave torch as it was found.

    Scopes that are still entered go on to set devices. A guard entered later opens the doors again.

    Returns
    -------
    list of str
        The names that somebody else patched over devguard, which stay as they are; normally empty.
    """
    with _lock:
        left = integrations.disarm() + door_table.close_all()
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
    if found is None or found.device is not None:
        return found and found.device
    return accelerator.torch_module().device(found.tag)  # the environment named it, and nothing has entered it yet


def _look(where: str) -> None:
    """Look for contexts that nobody owns."""
    if scope.process.adoption is not None:
        scope.process.adoption.settle()
    door_table.inspect(where)


def strays() -> tuple[Stray, ...]:
    """Return what strayed in this process so far: one record per call site, in the order of their first time."""
    _look("when strays() was asked")
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
        in force on this thread, ``process_owner``, ``problem`` (why ``DEVGUARD`` is not in
        force), ``log`` (the file of ``DEVGUARD_LOG``, or why it cannot be written), ``said_by`` (who gave the
        process its settings), ``adoption`` (how the environment found its owner), ``owned`` and ``contexts`` (device
        names), ``doors`` (per door: ``open``, ``mode``, problems, copies taken before it opened), ``strays`` (total),
        ``strays_not_kept``.
    """
    torch = sys.modules.get("torch")
    in_force = scope.current_owner()
    _look("when status() was asked")
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
        "problem": autoload.problem,
        "log": journal.log and journal.log.where,
        "said_by": scope.process.said_by or None,
        "adoption": scope.process.adoption and scope.process.adoption.as_dict(),
        "owned": owners.owned(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
        "doors": rows,
        "strays": journal.total,
        "strays_not_kept": journal.dropped,
    }
