"""The text of a line of code that a log names. The name may be anything, so only Python files are read, and only here.

A report is often handed on, so nothing else is quoted: no other kind of file, no link that leads to one, no device.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

__all__ = ["MOST_READ", "Quote", "quote"]

MOST_READ = 4 << 20  # bytes of a source file
LONGEST = 200  # characters of a line


@dataclass(frozen=True)
class Quote:
    """A line of a file as it is now.

    Attributes
    ----------
    text : str
        The line without its indent; empty if it cannot be read.
    changed : bool
        Whether the file has changed since the line ran.
    """

    text: str = ""
    changed: bool = False


def quote(file: str, line: int, ran: float) -> Quote:
    """Return a line of a Python file.

    Parameters
    ----------
    file : str
        The path; one that is not absolute is not read, because the folder is not known.
    line : int
        From 1.
    ran : float
        When the line ran, in seconds since 1970.
    """
    if line < 1 or "\0" in file or not os.path.isabs(file) or not os.path.realpath(file).endswith(".py"):
        return Quote()
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # Opening a device may do something to it.
            return Quote()
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, encoding="utf-8", errors="replace") as opened:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_READ:
                return Quote()
            lines = opened.read(MOST_READ).splitlines()
    except (OSError, ValueError):
        return Quote()
    text = lines[line - 1].strip() if line <= len(lines) else ""
    return Quote(text if len(text) <= LONGEST else text[:LONGEST] + "...", found.st_mtime > ran)
