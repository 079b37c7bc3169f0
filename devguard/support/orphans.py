"""Orphans in shared memory: files that a process left when it ended. They are removed by strict rules, or not at all.

A file is an orphan if its name carries the pid of a process that has ended, if it is a regular file of this user with
one name, unchanged for a minute (it may be in flight), and if no process has it open or mapped. That a process has
ended can be seen only of processes of this pid namespace, so the user has to state that the folder serves no other one.
No file is removed as long as one process cannot be looked into, because that process may have the file open.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

from devguard.support import file_holders, shared_memory
from devguard.support.file_holders import Holders
from devguard.support.shared_memory import FOLDER, PROC, Segment

__all__ = ["find", "Plan", "Removal", "remove"]

MIN_AGE_S = 60.0
BATCH = 32  # files removed between one look at all processes and the next

# Not blocking, because another program may have put a pipe in the place of the file.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

Kept = list[tuple[Segment, str]]  # with the reason


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `remove` would remove.

    Parameters
    ----------
    orphans : list of Segment
        The files that the rules permit to remove, most bytes first.
    kept : list of (Segment, str)
        The other entries of the folder, each with the reason.
    obstacles : list of str
        Why nothing can be removed now, one sentence each; see `file_holders.Holders`.
    """

    orphans: list[Segment]
    kept: Kept
    obstacles: list[str]


@dataclasses.dataclass(frozen=True)
class Removal:
    """What `remove` has done.

    Parameters
    ----------
    removed : list of Segment
        The files that it removed.
    kept : list of (Segment, str)
        The orphans that it did not remove, each with the reason.
    obstacles : list of str
        Why it stopped, one sentence each.
    """

    removed: list[Segment]
    kept: Kept
    obstacles: list[str]


def find(folder: Path = FOLDER, *, now: float | None = None, proc: Path = PROC) -> Plan:
    """Find the orphans in a folder; remove nothing.

    Raises
    ------
    OSError
        If the folder is missing or cannot be read.
    """
    segments = shared_memory.scan(folder, now=now, proc=proc)
    named = [segment for segment in segments if _find_reason(segment) is None]
    holders = _find_holders(named, folder, proc)
    orphans, kept = [], []
    for segment in segments:
        reason = _find_reason(segment) or _name_holders(segment, holders)
        if reason is None:
            orphans.append(segment)
        else:
            kept.append((segment, reason))
    return Plan(orphans, kept, holders.obstacles)


def remove(plan: Plan, folder: Path = FOLDER, *, now: float | None = None, proc: Path = PROC) -> Removal:
    """Remove the orphans of a plan, after another look at each of them.

    Call it only if the user has stated that no other pid namespace shares the folder.

    Raises
    ------
    OSError
        If there are orphans, and the folder is missing or cannot be read.
    """
    removal = Removal([], [], [])
    if not plan.orphans:
        return removal
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for start in range(0, len(plan.orphans), BATCH):
            batch = plan.orphans[start : start + BATCH]
            holders = _find_holders(batch, folder, proc)
            if holders.obstacles:
                removal.obstacles.extend(holders.obstacles)
                removal.kept.extend(
                    (segment, "not every process can be looked into") for segment in plan.orphans[start:]
                )
                break
            for segment in batch:
                reason = _name_holders(segment, holders) or _remove(segment, descriptor, now, proc)
                if reason is None:
                    removal.removed.append(segment)
                else:
                    removal.kept.append((segment, reason))
    finally:
        os.close(descriptor)
    return removal


def _remove(segment: Segment, folder: int, now: float | None, proc: Path) -> str | None:
    """Remove a file of the folder with this descriptor; return why not, None if it is removed."""
    try:
        descriptor = os.open(segment.name, _FLAGS, dir_fd=folder)
    except OSError as error:
        return f"it cannot be opened: {error.strerror}"
    try:
        state = os.fstat(descriptor)
        found = shared_memory.describe(segment.name, state, now=time.time() if now is None else now, proc=proc)
        if not _is_same(found, segment):
            return "it has changed since the list was made"
        reason = _find_reason(found)
        if reason is not None:
            return reason
        if file_holders.is_open_elsewhere(descriptor):
            return "a process that /proc does not show has it open"
        # No call removes a file by its descriptor. In a folder with the sticky bit, as /dev/shm is, only this user
        # and root could put another file in its place between these two.
        named = os.stat(segment.name, dir_fd=folder, follow_symlinks=False)
        if (named.st_dev, named.st_ino) != segment.identity:
            return "it has changed since the list was made"
        os.unlink(segment.name, dir_fd=folder)
    except OSError as error:
        return f"it cannot be removed: {error.strerror}"
    finally:
        os.close(descriptor)
    return None


def _find_reason(segment: Segment) -> str | None:
    """Return why a file is no orphan, as far as the file and its name show."""
    if segment.kind != "file":
        return "it is no regular file"
    if segment.pid is None:
        return "its name carries no pid"
    if segment.process != "ended":
        reused = "; it started after the file was made, so the pid may be reused" if segment.process == "reused" else ""
        return f"process {segment.pid} is running{reused}"
    if segment.uid != os.geteuid():
        return f"it belongs to uid {segment.uid}"
    if segment.links != 1:
        return f"it has {segment.links} names"
    if segment.age_s < MIN_AGE_S:
        return f"it is less than {MIN_AGE_S:g} s old, and may be in flight"
    return None


def _is_same(found: Segment, planned: Segment) -> bool:
    return (found.identity, found.size, found.changed) == (planned.identity, planned.size, planned.changed)


def _find_holders(segments: list[Segment], folder: Path, proc: Path) -> Holders:
    if not segments:
        return Holders({}, [])
    return file_holders.find({segment.identity: segment.name for segment in segments}, folder, proc)


def _name_holders(segment: Segment, holders: Holders) -> str | None:
    pids = holders.pids.get(segment.identity)
    return f"it is open or mapped in process {', '.join(map(str, pids))}" if pids else None
