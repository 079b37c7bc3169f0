"""Failures of devguard itself: reported to the user or recorded, while the program goes on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Failures", "warn_user"]

MAX_FAILURES = 16


def warn_user(text: str) -> None:
    """Warn with `text`; print it on standard error where the program's filters turn warnings into errors."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(text, file=sys.stderr)


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
