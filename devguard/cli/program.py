"""Find the program named after ``--`` and replace this process with it, for ``devguard sim`` and ``devguard run``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping

__all__ = ["become", "find"]

NOT_FOUND, NOT_RUNNABLE = 127, 126  # the exit statuses of a shell


def find(command: str, program: str) -> str | None:
    """Return the path of `program`, or None after a message from ``devguard <command>`` if it is not on PATH."""
    path = shutil.which(program)
    if path is None:
        print(f"devguard {command}: there is no program {program!r} on PATH", file=sys.stderr)
    return path


def become(command: str, path: str, program: list[str], environment: Mapping[str, str]) -> int:
    """Replace this process with `program`. If that fails, print a message and return the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(path, program, environment)
    except OSError as error:
        print(f"devguard {command}: {path} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_RUNNABLE
