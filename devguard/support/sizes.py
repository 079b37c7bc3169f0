"""Sizes of memory as people write them: ``1GiB``, ``512M``."""

from __future__ import annotations

import re

__all__ = ["parse_size"]

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MOST_DIGITS = 40  # a float holds no number of some hundred digits


def parse_size(text: str) -> int | None:
    """Return the bytes that a text such as ``8G``, ``1.5 GiB`` or ``4096`` names, in powers of 1024; None if none."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if parts is None or len(parts[1]) > _MOST_DIGITS:
        return None
    return int(float(parts[1]) * 2 ** _POWERS[parts[2].upper()])
