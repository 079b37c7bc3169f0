"""Callbacks at the orderly end of a process, `multiprocessing` children included.

``atexit`` runs nothing in a child of `multiprocessing`, which leaves by ``os._exit``. The finalizers of
`multiprocessing` run nothing in other processes, and are cleared when a spawned child starts. So `run` is registered
with both, and the door ``children`` calls it too. A process that is killed, or that calls ``os._exit``, runs no
callback.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.support.notices import warn_user

__all__ = ["forget", "register", "run"]

_finalizers: list[Any] = []  # the one of this process; a spawned or forked child clears the registry
_callbacks: dict[Callable[[], None], int] = {}  # callback -> the process that registered it


def register(callback: Callable[[], None]) -> None:
    """Call `callback` once when this process ends, the latest one first. A forked child must register again."""
    forget(callback)
    _callbacks[callback] = os.getpid()
    atexit.unregister(run)
    atexit.register(run)
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and not any(finalizer.still_active() for finalizer in _finalizers):
        _finalizers[:] = [util.Finalize(None, run, exitpriority=100)]


def forget(callback: Callable[[], None]) -> None:
    """Unregister `callback`."""
    _callbacks.pop(callback, None)


def run() -> None:
    """Run the callbacks of this process."""
    pid = os.getpid()
    while _callbacks:
        callback, registered_in = _callbacks.popitem()
        if registered_in != pid:
            continue
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the other callbacks must run, and the process must end
            warn_user(f"devguard could not finish in this process: {type(error).__name__}: {error}")
