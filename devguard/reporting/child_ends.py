"""The ends of child processes, seen by the parent that collects them: a killed child writes no last line to its log.

While a log is written, ``Popen`` of `multiprocessing` (fork, spawn, forkserver) and of `subprocess` tells the log of
each child that failed. Out of reach: children that other code collects (``os.waitpid``, asyncio, libraries in C). A
status 0 is not told, because `subprocess` also reports it where the status is unknown.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from devguard.support.patching import DoorError, Patches

__all__ = ["unwatch", "watch"]

Note = Callable[[int, int], None]

_patches = Patches()


class _State:
    """The state of this module.

    Attributes
    ----------
    note : callable or None
        What the ends are passed to; None where none are watched.
    """

    def __init__(self) -> None:
        self.note: Note | None = None


_state = _State()


def watch(note: Note) -> None:
    """Call ``note(pid, code)`` for each child that ended with a status other than 0; a signal is negative."""
    from devguard.support.import_hooks import when_imported  # imports wrapt

    _state.note = note
    when_imported("multiprocessing.popen_fork", _watch_multiprocessing)  # spawn inherits from fork
    when_imported("multiprocessing.popen_forkserver", _watch_multiprocessing)
    when_imported("subprocess", _watch_subprocess)


def unwatch() -> list[str]:
    """Undo `watch`; return the names that other code has patched since."""
    _state.note = None
    return _patches.restore()


def _watch_multiprocessing(module: ModuleType) -> None:
    popen: Any = module.Popen
    if _state.note is None or _patches.has(popen):
        return
    with contextlib.suppress(DoorError):  # the log then has no end of such children, as where no parent is guarded
        poll = _patches.find(popen, "poll")

        def poll_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
            was_running = self.returncode is None
            code = poll(self, *args, **kwargs)
            if code and was_running:
                _tell(self.pid, code)
            return code

        _patches.replace(popen, "poll", poll_and_tell)


def _watch_subprocess(module: ModuleType) -> None:
    popen: Any = module.Popen
    if _state.note is None or _patches.has(popen):
        return
    with contextlib.suppress(DoorError):  # as above; the class may be one of gevent
        handle = _patches.find(popen, "_handle_exitstatus")

        def handle_and_tell(self: Any, sts: int, *args: Any, **kwargs: Any) -> Any:
            result = handle(self, sts, *args, **kwargs)
            if sts and not os.WIFSTOPPED(sts):
                _tell(self.pid, self.returncode)
            return result

        _patches.replace(popen, "_handle_exitstatus", handle_and_tell)


def _tell(pid: int, code: int) -> None:
    try:
        if _state.note is not None:
            _state.note(pid, code)
    except Exception:  # noqa: BLE001 - the program collects a child, and may be at its end
        return
