"""Sizes of memory as people write them: ``1GiB``, ``512M``."""

from __future__ import annotations

import re
from typing import TypeGuard

__all__ = ["is_budget", "parse_size"]

_LEAST_BUDGET = 1 << 16  # bytes of an arena of devguard.transport
_MOST_BUDGET = 1 << 62

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MOST_DIGITS = 40  # a float holds no number of some hundred digits


def parse_size(text: str) -> int | None:
    """Return the bytes that a text such as ``8G``, ``1.5 GiB`` or ``4096`` names, in powers of 1024; None if none."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if parts is None or len(parts[1]) > _MOST_DIGITS:
        return None
    return int(float(parts[1]) * 2 ** _POWERS[parts[2].upper()])


def is_budget(size: object) -> TypeGuard[int]:
    """Return whether `size` is a number of bytes that an arena can have."""
    return isinstance(size, int) and not isinstance(size, bool) and _LEAST_BUDGET <= size < _MOST_BUDGET
