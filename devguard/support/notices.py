"""Messages to the user, and failures of devguard itself, while the program goes on.

Nothing here raises an `Exception` or writes to standard output, whatever the program has done to its warnings,
standard error and logging. `warn_user` follows the program's warnings filters. `alert` does not: it is for a guard that
is off, or only observes, although the program asked for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = [
    "alert",
    "alerts",
    "DEBUG",
    "ERROR",
    "Failures",
    "flush",
    "INFO",
    "is_logged",
    "log",
    "log_at",
    "on_alert",
    "print_error",
    "stop_on_alert",
    "warn_user",
    "WARNING",
]

MAX_FAILURES = 16
MAX_ALERTS = 256

LOGGER = "devguard"
# As in logging, which is imported only where a record is logged.
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40

_alerts: dict[str, None] = {}  # the texts of this process, in order; each is shown once
_listeners: dict[Callable[[str], None], None] = {}


def warn_user(
    text: str, category: type[Warning] = RuntimeWarning, at: tuple[str, int] | None = None, level: int = 2
) -> None:
    """Issue a warning; where that raises, print its text on standard error.

    Parameters
    ----------
    text, category : str, type
        The warning.
    at : tuple of str and int, optional
        The file and line to which it belongs.
    level : int
        Without `at`: how many frames out the line lies to which it belongs; 1 is the caller.
    """
    try:
        if at is None:
            warnings.warn(text, category, stacklevel=level + 1)
        else:
            warnings.warn_explicit(text, category, *at)
    except Exception:  # noqa: BLE001 - a filter that makes it an error, or the program's own `showwarning`
        line = text if at is None else f"{at[0]}:{at[1]}: {category.__name__}: {text}"
        if not print_error(line) and is_logged(WARNING):
            log(line, WARNING)


def alert(text: str) -> None:
    """Report a guard that does not guard, once per text: on standard error, and to the logger and the log file."""
    if text in _alerts or len(_alerts) >= MAX_ALERTS:
        return
    _alerts[text] = None
    print_error(text)
    if is_logged(ERROR):
        log(text, ERROR)
    for listener in tuple(_listeners):
        with contextlib.suppress(Exception):
            listener(text)
    if not _listeners:
        _write_to_log(text)


def _write_to_log(text: str) -> None:
    """Write an alert to the folder that ``DEVGUARD_LOG`` names, where no log has been started: the guard is off."""
    with contextlib.suppress(Exception):  # the text has been printed
        if os.environ.get("DEVGUARD_LOG", "").strip():
            from devguard.support import log_folder, process_file

            folder = log_folder.locate()
            if folder is not None:
                process_file.open_in(folder).write_alert(text)


def alerts() -> tuple[str, ...]:
    """Return the texts of all alerts of this process so far."""
    return tuple(_alerts)


def on_alert(listener: Callable[[str], None]) -> None:
    """Call ``listener(text)`` at each alert from now on."""
    _listeners[listener] = None


def stop_on_alert(listener: Callable[[str], None]) -> None:
    """Undo `on_alert`."""
    _listeners.pop(listener, None)


def print_error(text: str) -> bool:
    """Print a line on standard error, never on standard output (as `print` may); return whether it worked."""
    stream = getattr(sys, "stderr", None)
    if stream is None:
        return False
    try:
        try:
            stream.write(f"{text}\n")
        except UnicodeError:
            stream.write(f"{text.encode('ascii', 'backslashreplace').decode()}\n")
        stream.flush()
    except Exception:  # noqa: BLE001 - it is closed, broken or the program's own
        return False
    return True


def flush() -> None:
    """Flush the standard streams, of which a program may have closed or replaced each."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def log(text: str, level: int, logger: str = LOGGER) -> None:
    """Log a record; a handler that raises is ignored."""
    with contextlib.suppress(Exception):
        import logging

        logging.getLogger(logger).log(level, "%s", text)


def log_at(place: tuple[str, int, str], text: str, level: int, fields: Mapping[str, object]) -> None:
    """Log a record as if code of the user had logged it; a handler that raises is ignored.

    Parameters
    ----------
    place : tuple of str, int and str
        The file, the line and the function to which the record belongs; empty where there are none.
    text, level : str, int
        The message, in which nothing is replaced, and its level.
    fields : mapping of str to object
        Attributes of the record, which handlers find as those of ``extra``.
    """
    with contextlib.suppress(Exception):
        import logging

        logger, (file, line, function) = logging.getLogger(LOGGER), place
        logger.handle(logger.makeRecord(LOGGER, level, file, line, text, (), None, function, fields))


def is_logged(level: int) -> bool:
    """Return whether the program handles records of this level of the logger.

    Where it does not, logging would print warnings and errors on standard error.
    """
    logging: Any = sys.modules.get("logging")
    with contextlib.suppress(Exception):
        logger = logging and logging.getLogger(LOGGER)
        return bool(logger and logger.isEnabledFor(level) and logger.hasHandlers())
    return False


class Failures:
    """The first errors inside one door, for its `status()`.

    Parameters
    ----------
    *verdicts : type
        Exceptions that `safely` does not catch: verdicts on the program, not failures of devguard.
    """

    def __init__(self, *verdicts: type[Exception]) -> None:
        self._verdicts = verdicts
        self._texts: list[str] = []

    def safely(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` and return its result; record an error, and return None."""
        try:
            return function(*args)
        except self._verdicts:
            raise
        except Exception as error:  # noqa: BLE001 - a failure of devguard must not end a thread or a process
            self.record(error)
            return None

    def record(self, error: Exception) -> None:
        """Record an error."""
        if len(self._texts) < MAX_FAILURES:
            self._texts.append(f"{type(error).__name__}: {error}")

    def clear(self) -> None:
        """Forget all errors."""
        self._texts.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)
