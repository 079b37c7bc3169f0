"""Find the program named after ``--`` and replace this process with it, for ``devguard sim`` and ``devguard run``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from devguard.support.notices import flush
from devguard.support.terminal import complain

__all__ = ["become", "find"]

NOT_FOUND, NOT_RUNNABLE = 127, 126  # the exit statuses of a shell


def find(command: str, program: str) -> str | None:
    """Return the path of `program`, or None after a message from ``devguard <command>`` if it is not on PATH."""
    path = shutil.which(program)
    if path is None:
        complain(f"devguard {command}: there is no program {program!r} on PATH")
    return path


def become(command: str, path: str, program: list[str], environment: Mapping[str, str]) -> int:
    """Replace this process with `program`. If that fails, print a message and return the exit status."""
    flush()
    try:
        os.execve(path, program, environment)
    except OSError as error:
        complain(f"devguard {command}: {path} cannot be run: {error.strerror}")
        return NOT_RUNNABLE
