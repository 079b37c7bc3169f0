"""The C compiler: finding and running it, for the parts of devguard that are compiled on first use.

Each failure raises an error of the caller's class, with what is missing and how to install it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from devguard.errors import DevGuardError

__all__ = ["find", "HEADER", "run"]

HEADER = Path(__file__).parent / "csrc" / "process.h"  # the sources of several parts include it


def find(purpose: str, error: type[DevGuardError], *, tools: Sequence[str] = ()) -> str:
    """Return the C compiler: ``$CC``, or cc, gcc or clang.

    Parameters
    ----------
    purpose : str
        What needs the compiler, in the plural: the message begins with it.
    error : type
        The class of the error.
    tools : sequence of str
        Programs of binutils that are needed as well.
    """
    named = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, [named] if named else ["cc", "gcc", "clang"])), None)
    if found is None:
        tried = f"CC={named} is not an installed program" if named else "neither cc, gcc nor clang is on PATH"
        raise error(
            f"{purpose} need a C compiler, and {tried}: install one (`apt install gcc libc6-dev`, `dnf install gcc`) "
            "or name it in CC"
        )
    for tool in tools:
        if shutil.which(tool) is None:
            raise error(f"{purpose} need {tool}: install binutils (`apt install binutils`)")
    return found


def run(command: Sequence[str], source: str, error: type[DevGuardError]) -> str:
    """Run one step of a build and return its output; an error message calls the input `source`."""
    variables = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables)
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise error(
            f"{source} could not be compiled by {command[0]}; a C compiler with its C library's headers is needed "
            f"(`apt install gcc libc6-dev`)\n{last}"
        )
    return done.stdout
