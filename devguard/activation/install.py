"""Installing devguard for a whole process, and uninstalling it.

``install`` gives every thread of the process an owner where no guard is in force. ``assign`` does so for an integration
that knows the role of the process. ``uninstall`` restores torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from devguard import modes
from devguard.activation import environment
from devguard.doors import table
from devguard.errors import ConfigError
from devguard.modes import DEFAULT_MODE, DoorMode, Mode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner, parse_owner
from devguard.ownership.prepare import forget, prepare
from devguard.ownership.process import INSTALLED, process
from devguard.ownership.resolve import owner_from_environment, owner_not_found
from devguard.ownership.stack import local
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.support import context_check
from devguard.support.forks import opening
from devguard.support.installed_torch import import_torch

__all__ = ["assign", "install", "on_uninstall", "uninstall"]

_undo: dict[Callable[[], list[str]], None] = {}  # called first by `uninstall`


def install(
    first: Any = None,
    second: Any = None,
    /,
    *,
    device: Any = None,
    mode: Mode | None = None,
    doors: Mapping[str, DoorMode] | None = None,
) -> None:
    """Make a device the owner of this whole process, and open the doors.

    The current device of the calling thread becomes the owner's. A guard has precedence. A second call replaces the
    settings of the first.

    Parameters
    ----------
    first, second : optional
        The device, then the mode, as in ``install("cuda:1", "warn")``. The mode may come first, as in older programs.
    device : int, str or torch.device, optional
        The owner; by default ``DEVGUARD_DEVICE``, else the launcher's local rank, else the owner of the enclosing
        guard.
    mode : {'off', 'observe', 'warn', 'repair', 'error'}
        What the doors do with a stray where no scope sets a mode; ``'repair'`` by default.
    doors : mapping of str to str, optional
        The modes of single doors.

    Raises
    ------
    ConfigError
        For a mode or a door that does not exist.
    DeviceResolutionError
        If no device is named, or if this process does not see the device.
    """
    device, mode = _order(first, second, device, mode)
    checked = modes.check_mode(DEFAULT_MODE if mode is None else mode)
    checked_doors = {} if doors is None else table.check_doors(doors)
    if device is not None:
        owner = parse_owner(device)
    else:
        found, looked = owner_from_environment()
        owner_or_none = found or in_force.owner()
        if owner_or_none is None:
            raise owner_not_found(looked)
        owner = owner_or_none
    _own(owner, checked, checked_doors, INSTALLED)


def _order(first: Any, second: Any, device: Any, mode: Any) -> tuple[Any, Any]:
    """Return the device and the mode that a call of `install` means, in either order."""
    is_mode = [isinstance(value, str) and value in modes.MODES for value in (first, second)]
    call = f"install({', '.join(repr(value) for value in (first, second) if value is not None)}, ...)"
    if all(is_mode):
        raise ConfigError(f"{call} names two modes. Give the device, then the mode: install('cuda:1', {second!r}).")
    if is_mode[0]:
        first, second = second, first
    if second is not None and not is_mode[0] and not is_mode[1]:
        modes.check_mode(second)
    for name, positional, keyword in (("device", first, device), ("mode", second, mode)):
        if positional is not None and keyword is not None:
            raise ConfigError(f"{call} names the {name} twice, also by {name}={keyword!r}. Give it once.")
    return (device if first is None else first), (mode if second is None else second)


def assign(device: Any, *, role: str) -> bool:
    """Make a device the owner of this process, because of the role of the process; for integrations.

    The modes stay as the environment or the parent process sets them. An ``install()`` of the program stays in force.

    Parameters
    ----------
    device : int, str or torch.device
        The owner.
    role : str
        The role of this process, such as ``"SGLang scheduler TP1"``; shown by ``status()``.

    Returns
    -------
    bool
        Whether the device is the owner now; False where the program's own ``install()`` stays in force.

    Raises
    ------
    DeviceResolutionError
        If this process does not see the device.
    """
    if process.source == INSTALLED and process.owner is not None:  # A forked child has no owner.
        return False
    settings = environment.read()
    mode = process.mode or settings.mode or DEFAULT_MODE
    _own(parse_owner(device, role), mode, dict(process.doors) or settings.doors, role)
    return True


def _own(owner: Owner, mode: Mode, doors: dict[str, DoorMode], source: str) -> None:
    """Make `owner` the firm owner of this process."""
    import_torch()  # Before the lock is taken: `import torch` may activate devguard, which takes the lock.
    with opening:
        table.open_all()
        prepare(owner, lambda door: doors.get(door, mode))
        process.configure(mode, doors, source)
        process.own(owner)
        context_check.follow(mode)
        if owner.index >= 0 and not local.stack:
            local.stack.take(owner.index)
    journal.note_state()


def on_uninstall(undo: Callable[[], list[str]]) -> None:
    """Call ``undo()`` once, at the next `uninstall`; it returns names as `uninstall` does. For integrations."""
    _undo[undo] = None


def uninstall() -> list[str]:
    """Close every door, forget the process's owner, and restore torch.

    Scopes that are still entered continue to set devices. A guard entered later opens the doors again.

    Returns
    -------
    list of str
        The patched names that other code has replaced since, which stay as they are; normally empty.
    """
    with opening:
        left: list[str] = []
        while _undo:
            left += _undo.popitem()[0]()
        left += table.close_all()
        forget()
        process.reset()
        allowlist.forget_allowances()
        context_check.restore()
    return left
