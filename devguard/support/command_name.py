"""A short name for a process, made of its command line."""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["shorten"]


def shorten(words: Sequence[str]) -> str:
    """Return the name of the program in a command line; for Python that of the script or the module.

    Parameters
    ----------
    words : sequence of str
        The command line, the interpreter first.
    """
    program = os.path.basename(words[0]) if words else ""
    if not program.startswith("python"):
        return program or "?"
    rest = iter(words[1:])
    for word in rest:
        if word == "-c":
            # A command line that was written as one text has the code in several words.
            return "multiprocessing child" if "multiprocessing" in " ".join(rest) else f"{program} -c"
        if word == "-m":
            return f"{program} -m {next(rest, '')}".rstrip()
        if word in ("-W", "-X"):
            next(rest, None)  # the value of the option is not a script
        elif not word.startswith("-"):
            return os.path.basename(word)
    return program
