"""What is to be done when a process ends, however it ends in an orderly way.

``atexit`` runs nothing in a child of `multiprocessing`, which leaves by ``os._exit``; its own finalizers run nothing in
other processes, and are cleared as a spawned child begins. So a callback is registered with both, and the door
``children`` runs them too. What is killed, or calls ``os._exit`` by itself, runs none.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

from devguard.support.notices import warn_user

__all__ = ["register", "forget", "run"]

_callbacks: dict[Callable[[], None], int] = {}  # and the process that each is for


def register(callback: Callable[[], None]) -> None:
    """Call `callback` once when this process ends, the latest one first; a forked child has to ask anew."""
    forget(callback)
    _callbacks[callback] = os.getpid()
    atexit.unregister(run)
    atexit.register(run)
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, run, exitpriority=100)


def forget(callback: Callable[[], None]) -> None:
    """Do not call `callback` any more."""
    _callbacks.pop(callback, None)


def run() -> None:
    """Run what is to be run in this process."""
    pid = os.getpid()
    while _callbacks:
        callback, asked_by = _callbacks.popitem()
        if asked_by != pid:
            continue
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - the others have their end to write, and the process its own
            warn_user(f"devguard could not finish in this process: {type(error).__name__}: {error}")
