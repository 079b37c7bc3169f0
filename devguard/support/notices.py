"""Telling the user that devguard itself could not do something, at no cost to the program."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]


def warn_user(text: str) -> None:
    """Warn of `text`; on standard error, where the program's filters turn warnings into errors. It never raises."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(text, file=sys.stderr)
