"""The first stray of each call site, announced where a program already looks: its logger and its own callbacks.

A stray is announced on the thread that strayed, after the journal has counted it and outside the journal's lock. Where
that thread may hold a lock that a log handler or a callback needs, another thread announces it. Neither can break the
program: what they raise is reported or ignored. Further strays of the call site are only counted.
"""

from __future__ import annotations

import _thread
import contextlib
import inspect
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType

from devguard.errors import ConfigError
from devguard.reporting.actions import is_stray
from devguard.reporting.rows import Row, format_row
from devguard.reporting.stray import Action, Stray
from devguard.support import callsite, notices
from devguard.support.notices import DEBUG, ERROR, INFO, WARNING
from devguard.support.terminal import printable  # not at the first stray: a fork may copy an import that is under way

__all__ = ["announce", "LEVELS", "on_stray", "Registration"]

# The level of the log record, by what was done: the harm that is left. What mode `warn` has warned of, and what is no
# stray, is not told a second time.
LEVELS: dict[Action, int] = {
    "refused": ERROR,
    "observed": WARNING,
    "repaired": INFO,
    "warned": DEBUG,
    "kept": DEBUG,
    "placed": DEBUG,
}

# Their functions hold locks while they run, or are called by finalizers, which may interrupt code that holds any lock.
_LOCKING_MODULES = frozenset({"logging", "logging.handlers", "queue", "weakref"})


class Registration:
    """A callback of `on_stray`: it is called until `remove`, or until the end of a ``with`` block."""

    __slots__ = ("_callback", "_has_failed")

    def __init__(self, callback: Callable[[Stray], object]) -> None:
        self._callback = callback
        self._has_failed = False

    def remove(self) -> None:
        """Call the callback no more. A second call does nothing."""
        _registrations.pop(self, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def call(self, stray: Stray) -> None:
        """Call the callback; its first error becomes a warning."""
        try:
            self._callback(stray)
        except Exception as error:  # noqa: BLE001 - a callback must not break the program
            if not self._has_failed:
                self._has_failed = True
                notices.warn_user(
                    f"devguard: the callback {callsite.name_of(self._callback)} of on_stray() failed: "
                    f"{type(error).__name__}: {error}. The program goes on, and further errors of this callback are "
                    "not reported. Catch them in the callback."
                )

    def __repr__(self) -> str:
        return f"devguard.on_stray({callsite.name_of(self._callback)})"


_registrations: dict[Registration, None] = {}


class _Thread(threading.local):
    waiting: deque[Stray] | None = None  # what is to be announced after the stray that this thread announces now


_here = _Thread()


def _forget_turn() -> None:
    """Let a child that a callback has forked announce its own strays: it may never return to the callback."""
    if _here.waiting is not None:
        _here.waiting.clear()  # the parent's
        _here.waiting = None


os.register_at_fork(after_in_child=_forget_turn)


def on_stray(callback: Callable[[Stray], object]) -> Registration:
    """Call ``callback(stray)`` for the first stray of each call site of this process, from now on.

    It is called on the thread that strayed, as soon as the verdict is known, so that a span or a request of that thread
    is still current; on another thread for a stray inside a log handler or a finalizer. Several threads may call it at
    once. It is not called for what was ``"placed"`` or ``"kept"``, which are no strays.

    Parameters
    ----------
    callback : callable
        Takes a `devguard.Stray` with a count of 1. An `Exception` that it raises is reported once, as a warning.
        `KeyboardInterrupt`, `SystemExit` and others that are no `Exception` pass: they end the program, a thread or a
        greenlet on request, and often come from a signal handler.

    Returns
    -------
    Registration
        ``remove()`` ends the calls, and so does the end of a ``with`` block::

            with devguard.on_stray(found.append):
                ...

    Raises
    ------
    ConfigError
        If `callback` cannot be called, or is a coroutine function.

    Notes
    -----
    A forked child keeps the callbacks; a spawned one has to register its own. `devguard.strays` returns earlier strays.
    """
    if not callable(callback):
        raise ConfigError(f"on_stray() takes a function with one parameter, the stray; got {callback!r}.")
    if inspect.iscoroutinefunction(callback):
        raise ConfigError(
            f"on_stray() cannot await {callsite.name_of(callback)}, a coroutine function. Give a plain function that "
            "hands the stray to your event loop: loop.call_soon_threadsafe(queue.put_nowait, stray)."
        )
    registration = Registration(callback)
    _registrations[registration] = None
    return registration


def announce(row: Row, nbytes: int, *, is_locked: bool) -> None:
    """Announce the first stray of a row; without callbacks, and where nothing logs it, this does nothing.

    Parameters
    ----------
    row : Row
        A new row of the journal.
    nbytes : int
        The bytes of its first stray.
    is_locked : bool
        Whether this thread holds the journal's lock.
    """
    action = row.key[-1]
    if not _wants(action) and not notices.is_logged(LEVELS[action]):
        return
    stray = format_row(row.key, row, 1, nbytes)
    if not is_locked and not _may_hold_locks(sys._getframe(1)):
        _announce_in_turn(stray)
        return
    with contextlib.suppress(RuntimeError):  # no thread starts at the end of the process; the journal has the stray
        _thread.start_new_thread(_announce_in_turn, (stray,))


def _wants(action: str) -> bool:
    """Return whether there are callbacks for this action."""
    return bool(_registrations) and is_stray(action)


def _may_hold_locks(frame: FrameType | None) -> bool:
    """Return whether `frame` or one of its callers logs, waits at a queue, or is a finalizer."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_globals.get("__name__") in _LOCKING_MODULES:
            return True
        frame = frame.f_back
    return False


def _announce_in_turn(stray: Stray) -> None:
    """Announce a stray; one of a callback or of a log handler waits until that one has returned."""
    if _here.waiting is not None:
        _here.waiting.append(stray)
        return
    waiting = _here.waiting = deque([stray])
    try:
        while waiting:
            _announce(waiting.popleft())
    finally:
        _here.waiting = None


def _announce(stray: Stray) -> None:
    level = LEVELS[stray.action]
    if notices.is_logged(level):
        _log(stray, level)
    if _wants(stray.action):
        for registration in tuple(_registrations):
            registration.call(stray)


def _log(stray: Stray, level: int) -> None:
    """Log a stray at the line of user code, as if that line had logged it."""
    site = stray.site
    file, line, function = ("", 0, "") if site is None else (site.file, site.line, site.function)
    fields = {
        "door": stray.door,
        "source": stray.source,
        "target": stray.target,
        "owner": stray.owner,
        "action": stray.action,
        "bytes": stray.bytes,
        "file": file,
        "line": line,
        "function": function,
        "via": stray.via or "",
        "rank": stray.rank or "",
        "thread": stray.thread,
        "note": stray.note or "",
    }
    notices.log_at(
        (file, line, function),
        printable(f"devguard: {stray}"),  # many programs, such as SGLang, do not log the name of the logger
        level,
        {f"devguard_{name}": value for name, value in fields.items()},
    )
