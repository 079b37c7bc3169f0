"""The values in the lines of a log, which may be of any type: each is returned as the type it must have, or refused."""

from __future__ import annotations

from typing import Any

__all__ = ["as_number", "as_text", "as_text_by_text", "as_text_or_none", "as_texts", "as_time", "MALFORMED"]

LATEST = 1 << 40  # seconds since 1970
# What reading a line raises that is not as devguard writes it.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


def as_number(value: Any) -> int:
    """Return a number of at most 64 bits that is not negative; the sum of many can still be printed.

    Raises TypeError for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise TypeError("not a number of devguard")
    return value


def as_text(value: Any) -> str:
    """Return a text; raise TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def as_text_or_none(value: Any) -> str | None:
    """Return a text or None; raise TypeError for anything else."""
    return None if value is None else as_text(value)


def as_texts(value: Any) -> list[str]:
    """Return a list of texts; raise TypeError for anything else."""
    if not isinstance(value, list):
        raise TypeError("not a list")
    return [as_text(each) for each in value]


def as_text_by_text(value: Any) -> dict[str, str]:
    """Return a dictionary from texts to texts; raise TypeError for anything else."""
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return {as_text(key): as_text(each) for key, each in value.items()}


def as_time(value: Any) -> float:
    """Return a time in seconds since 1970; raise TypeError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LATEST:
        raise TypeError("not a time")
    return float(value)
