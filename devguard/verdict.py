"""What becomes of one stray: the one decision that every door asks for.

A door finds that work is about to go to a device that is not the owner's, and asks here. The answer follows the mode in
force, and the stray is recorded. What is allowed (`allow`) is no stray.
"""

from __future__ import annotations

import fnmatch
import sys
from typing import Any

from devguard import callsite, owners, scope
from devguard.errors import ConfigError
from devguard.journal import journal, refused
from devguard.owners import Owner
from devguard.stray import LEFT

__all__ = ["allow", "allowed", "forget_allowed", "judge"]

# device tag -> module patterns whose code may use it; None: any code
_allowed: dict[str, set[str] | None] = {}


def allow(*devices: Any, modules: str | list[str] | None = None) -> None:
    """Allow work on devices that this process does not own: it is no stray, in any door.

    Parameters
    ----------
    *devices : int, str or torch.device
        The devices, such as ``"cuda:1"``.
    modules : str or list of str, optional
        Only for call sites in modules whose name matches one of these shell patterns, such as ``"mylib.offload*"``; a
        package's name includes its modules.

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
        tag = owners.parse(device).tag
        known = _allowed.get(tag, set())
        _allowed[tag] = None if patterns is None or known is None else known | patterns


def forget_allowed() -> None:
    """Allow nothing any more."""
    _allowed.clear()


def allowed(tag: str) -> bool:
    """Tell whether the code that runs now may use the device `tag`."""
    if tag not in _allowed:
        return False
    patterns = _allowed[tag]
    if patterns is None:
        return True
    module = callsite.module(sys._getframe(1))
    return any(fnmatch.fnmatchcase(module, p) or module.startswith(f"{p}.") for p in patterns)


def judge(
    door: str,
    source: str,
    owner: Owner,
    nbytes: int,
    advice: str,
    *,
    target: str | None = None,
    **known: Any,
) -> bool:
    """Decide about one stray, and record it.

    Parameters
    ----------
    door : str
        The door it came through.
    source : str
        The device it names, or several, separated by commas.
    owner : Owner
        Who owns the scope.
    nbytes : int
        Bytes of tensor data; 0 where there are none, or where nobody knows.
    advice : str
        For the error: what the reader can do.
    target : str, optional
        Where a repair would put it; None if it cannot be repaired.
    **known
        `dtype` and `shape`, where the door knows them; `start` as for `Journal.record`.

    Returns
    -------
    bool
        Whether the door is to repair it. If not, it is to be left as it is.

    Raises
    ------
    StrayDeviceError
        In mode ``error``.
    """
    adoption = scope.process.adoption
    if adoption is not None and not scope.local.stack:
        adoption.handle()
    mode = scope.mode_of(door)
    if mode == "off" or (_allowed and all(map(allowed, source.split(",")))):
        return False
    if mode == "error":
        raise refused(door, source, owner.tag, nbytes, advice, **known)
    if mode in ("repair", "copy") and target is not None:
        journal.record(door, source, target, owner.tag, "repaired", nbytes, **known)
        return True
    journal.record(door, source, source, owner.tag, LEFT.get(mode, "observed"), nbytes, **known)
    return False
