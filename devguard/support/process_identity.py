"""Which process a pid means: pids repeat, and count in one pid namespace of one machine until its next start.

A process is known by its pid space, its pid and its time of start. Needs neither torch nor wrapt.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from devguard.support import process_stat

__all__ = ["is_running", "pid_space", "started"]

PROC = Path("/proc")


def pid_space(proc: Path = PROC) -> str:
    """Return what two processes share if a pid means the same to both; empty if the kernel does not tell."""
    return _pid_space(proc, os.getpid())


@functools.lru_cache(maxsize=4)
def _pid_space(proc: Path, pid: int) -> str:
    """Return the pid space of this process; `pid`, because a forked child may be in another one."""
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii", errors="replace").strip()
        return f"{boot} {os.readlink(proc / 'self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int, proc: Path = PROC) -> int:
    """Return when a process started, in clock ticks since the machine started; 0 if there is none, or it has ended."""
    try:
        fields = process_stat.read_fields(f"{proc}/{pid}")
        return 0 if fields[process_stat.STATE] in process_stat.ENDED else int(fields[process_stat.STARTED])
    except (OSError, ValueError, IndexError):
        return 0


def is_running(pid: int, since: int, proc: Path = PROC) -> bool:
    """Return whether the process with this pid, of this pid space, is the one that started then, and has not ended."""
    return since > 0 and started(pid, proc) == since
