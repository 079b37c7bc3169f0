"""Folders that are made for this user alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["make"]


def make(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700; `Path.mkdir` gives its mode to the last one only.

    Raises
    ------
    OSError
        If one of them cannot be created. What exists already is not checked.
    """
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has just made it
            os.mkdir(each, 0o700)
