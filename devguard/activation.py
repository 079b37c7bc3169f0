"""Switching devguard on and off for a whole process, and saying how it stands.

``install`` gives every thread of the process an owner where no guard is in force. ``activate`` does it by environment,
for a program that knows nothing of devguard; ``assign``, for an integration that knows what the process is.
``uninstall`` leaves torch as it was found.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from devguard import (
    accelerator,
    adoption,
    ending,
    environment,
    in_force,
    owners,
    settings,
    verdict,
)
from devguard import doors as door_table
from devguard._version import __version__
from devguard.adoption import Adoption
from devguard.environment import Said
from devguard.journal import journal
from devguard.prepare import forget, prepare
from devguard.process import process
from devguard.settings import DEFAULT_MODE, DoorMode, Mode
from devguard.stack import local
from devguard.stray import Stray

__all__ = ["activate", "assign", "contexts", "install", "on_uninstall", "owner", "status", "strays", "uninstall"]

_lock = threading.RLock()  # importing torch inside it may activate devguard

_undo: dict[Callable[[], list[str]], None] = {}  # what `uninstall` calls first

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
        owner_or_none = found or in_force.owner()
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
    if process.source == INSTALLED and process.owner is not None:  # a forked child has left its owner behind
        return False
    said = environment.read()
    _own(owners.parse(device, role), process.mode or said.mode or DEFAULT_MODE, dict(process.doors) or said.doors, role)
    return True


def _own(owner: owners.Owner, mode: Mode, doors: dict[str, DoorMode], source: str) -> None:
    """Make `owner` the firm owner of this process."""
    accelerator.torch_module()  # before the lock, which torch's own loading of devguard takes
    with _lock:
        door_table.open_all()
        prepare(owner, lambda door: doors.get(door, mode))
        process.configure(mode, doors, source)
        process.own(owner)
        accelerator.set_torchs_own_check(mode)
        if owner.index >= 0 and not local.stack:
            local.stack.take(owner.index)


def on_uninstall(undo: Callable[[], list[str]]) -> None:
    """Call ``undo()`` once, at the next `uninstall`; it returns names as `uninstall` does. For integrations."""
    _undo[undo] = None


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
    with _lock:
        try:
            door_table.open_all()
            if process.mode is None:  # else a parent that was told more has said it
                process.configure(said.mode, said.doors, BY_ENVIRONMENT)
            if process.owner is None:
                _adopt(said, environ)
                process.restart = lambda: _adopt_again(said, environ)
            accelerator.set_torchs_own_check(process.mode_of(""))
        except Exception:
            uninstall()
            raise
    ending.at_end(_at_end)
    return True


def _adopt(said: Said, environ: Mapping[str, str], child: bool | None = None) -> None:
    """Let this process adopt the owner, or the first candidate for it, that the environment names."""
    several = owners.several(environ)
    if child is None:
        child = adoption.is_child()  # what a launcher says is said to its parent, and an owner is not inherited
    if said.owner is not None:
        owner, _ = owners.from_environment(environ)  # which checks that it is one device for one process
        _check_visible(owner)
        process.own(owner, Adoption(process, "DEVGUARD_DEVICE", firm=not child, pin=not child, several=several))
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    owner, source, firm, pin = None, "nothing yet", False, False
    if accelerator.device_count() == 0:
        source = "no GPU is visible"
    elif visible and "," not in visible and visible != "-1":
        owner, source, firm = owners.of_index(0), "CUDA_VISIBLE_DEVICES", True
    elif several and not child:
        owner, _ = owners.from_environment(environ)
        source, pin = "the launcher's local rank", True
    process.own(owner, Adoption(process, source, firm=firm, pin=pin, several=several))


def _adopt_again(said: Said, environ: Mapping[str, str]) -> None:
    _adopt(said, environ, child=True)  # multiprocessing does not say so yet
    ending.at_end(_at_end)


def _check_visible(owner: owners.Owner | None) -> None:
    if owner is not None and owner.index >= accelerator.device_count():
        raise accelerator.out_of_range("DEVGUARD_DEVICE", owner.index)


def _at_end() -> None:
    """Look at the contexts a last time, for the log."""
    if process.adoption is not None:
        door_table.look("at the end of the process")


def uninstall() -> list[str]:
    """Close every door, forget the process's owner, and leave torch as it was found.

    Scopes that are still entered go on to set devices. A guard entered later opens the doors again.

    Returns
    -------
    list of str
        The names that somebody else patched over devguard, which stay as they are; normally empty.
    """
    with _lock:
        left: list[str] = []
        while _undo:
            left += _undo.popitem()[0]()
        left += door_table.close_all()
        forget()
        process.reset()
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
    found = in_force.owner()
    if found is None or found.device is not None:
        return found and found.device
    return accelerator.torch_module().device(found.tag)  # the environment named it, and nothing has entered it yet


def strays() -> tuple[Stray, ...]:
    """Return what strayed in this process so far: one record per call site, in the order of their first time."""
    door_table.look("when strays() was asked")
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
    owned_by = in_force.owner()
    door_table.look("when status() was asked")
    rows = door_table.status()
    for name, row in rows.items():
        asked = name not in door_table.ON_REQUEST or in_force.is_requested(name)
        row["mode"] = in_force.mode_of(name) if row["open"] and asked else "off"
    return {
        "version": __version__,
        "pid": os.getpid(),
        "torch": getattr(torch, "__version__", None),
        "killed": settings.killed(),
        "mode": in_force.mode_of(""),
        "owner": owned_by and owned_by.tag,
        "process_owner": process.owner and process.owner.tag,
        "problem": process.problem,
        "log": journal.log and journal.log.where,
        "said_by": process.source or None,
        "adoption": process.adoption and process.adoption.as_dict(),
        "owned": owners.owned(),
        "contexts": [f"cuda:{index}" for index in accelerator.contexts()],
        "doors": rows,
        "strays": journal.total,
        "strays_not_kept": journal.dropped,
    }
