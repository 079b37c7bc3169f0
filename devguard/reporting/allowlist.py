"""The allow-list: devices that this process may use besides its own. Work on an allowed device is no stray."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from devguard.errors import ConfigError
from devguard.ownership.owner import parse_owner
from devguard.ownership.process import process
from devguard.support import callsite

__all__ = ["allow", "allowances", "are_allowed", "forget_allowances", "is_allowed", "is_empty", "scoped", "take_over"]

# device tag -> patterns of the modules that may use the device; None: any module
_allowed: dict[str, set[str] | None] = {}


def allow(*devices: Any, modules: str | list[str] | None = None) -> None:
    """Allow work on devices that this process does not own: it is no stray, in any door.

    Parameters
    ----------
    *devices : int, str or torch.device
        The devices, such as ``"cuda:1"``.
    modules : str or list of str, optional
        Only for call sites in modules with a name that matches one of these shell patterns, such as
        ``"mylib.offload*"``; a package's name includes its modules. The door ``native``, which finds contexts without
        their call site, allows a device that any module may use.

    Raises
    ------
    ConfigError
        If no device is given.
    DeviceResolutionError
        If one of them is not a device.
    """
    if not devices:
        raise ConfigError("allow() needs at least one device, such as allow('cuda:1').")
    patterns = None if modules is None else {modules} if isinstance(modules, str) else set(modules)
    for device in devices:
        tag = parse_owner(device).tag
        known = _allowed.get(tag, set())
        _allowed[tag] = None if patterns is None or known is None else known | patterns
    process.renew()


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """Return a context manager that restores the allow-list on exit."""
    before = _allowed.copy()
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)
        process.renew()


def forget_allowances() -> None:
    """Clear the allow-list."""
    _allowed.clear()
    process.renew()


def allowances() -> dict[str, list[str] | None]:
    """Return the allow-list as plain data: for each device the patterns of modules that may use it, None for all."""
    return {tag: None if patterns is None else sorted(patterns) for tag, patterns in _allowed.items()}


def take_over(allowances: Mapping[str, list[str] | None]) -> None:
    """Allow what a parent process allowed."""
    for tag, modules in allowances.items():
        allow(tag, modules=modules)


def is_empty() -> bool:
    """Return whether no device is allowed."""
    return not _allowed


def are_allowed(tags: str) -> bool:
    """Return whether the code that runs now may use each of these devices, which commas separate."""
    return bool(_allowed) and all(map(is_allowed, tags.split(",")))


def is_allowed(tag: str, module: str | None = None) -> bool:
    """Return whether `module`, by default that of the code that runs now, may use the device `tag`."""
    if tag not in _allowed:
        return False
    patterns = _allowed[tag]
    if patterns is None:
        return True
    if module is None:
        module = callsite.module_of(sys._getframe(1))
    return any(fnmatch.fnmatchcase(module, p) or module.startswith(f"{p}.") for p in patterns)
