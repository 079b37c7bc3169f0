"""Processes that have no log: their names and users, as the kernel says."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from devguard.support import command_name, process_stat

__all__ = ["describe", "inner_pids", "is_inside_container", "Neighbour"]

INITIAL_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel


@dataclass(frozen=True)
class Neighbour:
    """A process without a log.

    Attributes
    ----------
    name : str
        Its program and, where it is another, its user.
    user : int or None
        The user ID; None if the process cannot be seen.
    parent : int
        The process ID of its parent; 0 if that is not known.
    """

    name: str
    user: int | None
    parent: int = 0


def describe(pid: int) -> Neighbour:
    """Return what the kernel says of a process; never raises."""
    place = Path("/proc", str(pid))
    try:
        user = os.stat(place).st_uid
        words = (place / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        if not words[0]:  # a kernel thread, or a process that is just becoming another program
            words = [(place / "comm").read_text(encoding="utf-8", errors="replace").strip()]
        parent = int(process_stat.read_fields(place)[process_stat.PARENT])
    except OSError:
        return Neighbour("not in this namespace", None)
    name = command_name.shorten(words)
    return Neighbour(name if user == os.geteuid() else f"{name} ({_user_name(user)})", user, parent)


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"uid {user}"


def inner_pids() -> dict[int, int]:
    """Return the processes of PID namespaces below this one: their numbers here, and those inside."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            status = (Path(entry.path) / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        numbers = status.partition("\nNSpid:")[2].partition("\n")[0].split()
        if len(numbers) > 1:
            found[int(entry.name)] = int(numbers[-1])
    return found


def is_inside_container() -> bool:
    """Return whether this process has a PID namespace of its own, in which NVML's process IDs mean nothing."""
    try:
        return os.readlink("/proc/self/ns/pid") != INITIAL_NAMESPACE
    except OSError:
        return False
