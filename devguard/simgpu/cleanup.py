"""Removes the temporary state file of simulated GPUs when the last process that uses it has ended, however it ended.

``devguard sim`` becomes the program, so nothing of devguard is left in that process to clean up. A small process of its
own waits instead: first for the process that made the file, then for all that have its path in their environment, or
the file mapped or open. It runs this file as a script, apart from the user's packages and settings.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["when_unused"]

POLL_S = 0.5


def when_unused(folder: Path) -> None:
    """Remove `folder` when this process, and all processes that use the state file in it, have ended."""
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(folder)]
    with contextlib.suppress(OSError):  # then the file stays, as under a limit of processes
        nothing = subprocess.DEVNULL
        subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", check=False)


def _wait_for(pid: int) -> None:
    """Wait for a process that is no child of this one."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        waiting.poll()


def _is_used(folder: str) -> bool:
    """Return whether a process names a path in `folder` in its environment, or has one mapped or open."""
    mine = os.getpid()
    return any(int(pid) != mine and _uses(pid, folder) for pid in filter(str.isdecimal, os.listdir("/proc")))


def _uses(pid: str, folder: str) -> bool:
    path = f"{folder}{os.sep}"
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        process = Path("/proc", pid)
        if f"={path}".encode() in (process / "environ").read_bytes():
            return True
        if f" {path}".encode() in (process / "maps").read_bytes():  # a title may overwrite the environment
            return True
        return any(os.readlink(each).startswith(path) for each in (process / "fd").iterdir())
    return False


def _main(pid: int, folder: str) -> None:
    if os.fork():  # the program must not find a child that it has not started
        return
    os.setsid()
    _wait_for(pid)
    while _is_used(folder):
        time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
