"""The part of ``devguard doctor`` about shared memory: what lies in /dev/shm, and the removal of orphans."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from devguard.errors import ConfigError
from devguard.support import shared_memory
from devguard.support.terminal import complain, format_size, printable, show, show_json

if TYPE_CHECKING:
    from devguard.support.orphans import Plan, Removal
    from devguard.support.shared_memory import Segment

__all__ = ["configure", "examine", "run", "show_summary"]

FOLDER = shared_memory.FOLDER
PROC = shared_memory.PROC
LARGEST = 10  # files that the doctor names
MOST_KEPT = 10
MOST_OBSTACLES = 5
STATEMENT = "--no-other-pid-namespace"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options about shared memory."""
    group = parser.add_argument_group(
        "shared memory",
        f"A process that is killed leaves its files in {FOLDER}, where they occupy memory. Each of these options does "
        "only what it says, and not the other checks.",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--shared-memory",
        action="store_true",
        help=f"list all that lies in {FOLDER}: size, age, what its name says, and which processes have it open",
    )
    either.add_argument(
        "--reap",
        action="store_true",
        help=f"list what processes left in {FOLDER} when they ended and, with {STATEMENT}, remove it. Only files of "
        "yours are removed that carry the pid of such a process in their names and that no process has open or mapped, "
        "and only if each process can be looked into",
    )
    group.add_argument(
        STATEMENT,
        action="store_true",
        help=f"state that no other pid namespace uses this {FOLDER}. Without that, a process of another container "
        "would look as if it had ended. It is not so with docker --ipc=host or --ipc=container:NAME, with hostIPC, "
        f"with a volume at {FOLDER} that several containers mount, and on a host the containers of which do so",
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Do what the options about shared memory ask for.

    Returns
    -------
    int or None
        None if they ask for nothing; 0 if all is well, 1 if orphans could not be removed, 2 if the statement about pid
        namespaces is missing.
    """
    if arguments.no_other_pid_namespace and not arguments.reap:
        raise ConfigError(f"{STATEMENT} only goes with --reap.")
    if arguments.reap:
        return _reap(as_json=arguments.json, stated=arguments.no_other_pid_namespace)
    if arguments.shared_memory:
        return _list(as_json=arguments.json)
    return None


def examine() -> dict[str, Any] | None:
    """Return what lies in the folder, in short; None if there is no such folder."""
    try:
        segments = shared_memory.scan(FOLDER, proc=PROC)
        space = os.statvfs(FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return {"folder": str(FOLDER), "error": error.strerror}
    left = [segment for segment in segments if segment.process == "ended"]
    return {
        "folder": str(FOLDER),
        "error": None,
        "entries": len(segments),
        "bytes": sum(segment.nbytes for segment in segments),
        "free_bytes": space.f_bavail * space.f_frsize,
        "left_entries": len(left),
        "left_bytes": sum(segment.nbytes for segment in left),
        "largest": [dataclasses.asdict(segment) for segment in segments[:LARGEST]],
    }


def show_summary(found: dict[str, Any] | None) -> None:
    """Print what `examine` returned."""
    if found is None:
        show(f"shared memory: there is no {FOLDER} here")
        return
    if found["error"] is not None:
        show(f"shared memory: {found['folder']} cannot be read: {found['error']}")
        return
    total, free = format_size(found["bytes"]), format_size(found["free_bytes"])
    show(f"shared memory: {_count(found['entries'])} in {found['folder']}, {total}; {free} free")
    segments = [shared_memory.Segment(**row) for row in found["largest"]]
    for segment in segments:
        show(f"  {_describe(segment)}")
    rest = found["entries"] - len(segments)
    if rest:
        show(f"  and {rest} more: devguard doctor --shared-memory")
    if found["left_entries"]:
        left = f"{_count(found['left_entries'])}, {format_size(found['left_bytes'])}"
        show(f"  {left}, left by processes that have ended: devguard doctor --reap")


def _list(*, as_json: bool) -> int:
    """List all that lies in the folder."""
    from devguard.support import file_holders

    try:
        segments = shared_memory.scan(FOLDER, proc=PROC)
    except (FileNotFoundError, NotADirectoryError):
        segments = []
    holders = file_holders.Holders({}, [])
    if segments:
        holders = file_holders.find({each.identity: each.name for each in segments}, FOLDER, PROC)
    if as_json:
        rows = [{**dataclasses.asdict(each), "holders": holders.pids.get(each.identity, [])} for each in segments]
        show_json({"folder": str(FOLDER), "entries": rows, "obstacles": holders.obstacles})
        return 0
    if not segments:
        show(f"{FOLDER} is empty, or missing")
        return 0
    for segment in segments:
        pids = holders.pids.get(segment.identity, [])
        show(_describe(segment, f"open in {_join(pids)}" if pids else "not open"))
    show(f"{_count(len(segments))} in {FOLDER}, {format_size(sum(segment.nbytes for segment in segments))}")
    show("A file that is not open may still be in use: a sender can close it before its reader opens it.")
    show("What can be removed: devguard doctor --reap (it only lists).")
    _show_obstacles(holders.obstacles, "A process may have a file open that is listed as not open:")
    return 0


def _reap(*, as_json: bool, stated: bool) -> int:
    """List the orphans and, if the statement about pid namespaces was made, remove them."""
    from devguard.support import orphans

    try:
        plan = orphans.find(FOLDER, proc=PROC)
    except (FileNotFoundError, NotADirectoryError):
        plan = orphans.Plan([], [], [])
    removal = orphans.Removal([], [], [])
    if not as_json:
        _show_plan(plan)
    if stated and not plan.obstacles:
        removal = orphans.remove(plan, FOLDER, proc=PROC)
    status = 2 if not stated else 1 if plan.obstacles or removal.kept or removal.obstacles else 0
    if as_json:
        show_json(_as_dict(plan, removal, status))
    elif not stated:
        complain(_explain())
    else:
        _show_removal(plan, removal)
    return status


def _show_plan(plan: Plan) -> None:
    """Print what can be removed, and what has a pid in its name and is kept."""
    total = format_size(sum(segment.nbytes for segment in plan.orphans))
    show(f"orphans in {FOLDER}: {_count(len(plan.orphans))}, {total}")
    for segment in plan.orphans:
        show(f"  {_describe(segment)}")
    named = [(segment, reason) for segment, reason in plan.kept if segment.pid is not None]
    for segment, reason in named[:MOST_KEPT]:
        show(f"  kept, because {reason}: {printable(segment.name)}")
    rest = len(plan.kept) - min(len(named), MOST_KEPT)
    if rest:
        show(f"  also kept: {_count(rest)} (devguard doctor --shared-memory, or --reap --json for the reasons)")
    _show_obstacles(plan.obstacles, "No file can be removed now, because one may be in use that looks unused:")


def _show_removal(plan: Plan, removal: Removal) -> None:
    _show_obstacles(removal.obstacles, "No more files are removed, because one may be in use that looks unused:")
    for segment in removal.removed:
        show(f"removed {format_size(segment.nbytes)}: {printable(segment.name)}")
    if not removal.obstacles:
        for segment, reason in removal.kept:
            show(f"kept, because {reason}: {printable(segment.name)}")
    total = format_size(sum(segment.nbytes for segment in removal.removed))
    show(f"removed {_count(len(removal.removed))} of {len(plan.orphans)}, {total}")


def _show_obstacles(obstacles: list[str], title: str) -> None:
    if not obstacles:
        return
    show(title)
    for obstacle in obstacles[:MOST_OBSTACLES]:
        show(f"  {printable(obstacle)}")
    if len(obstacles) > MOST_OBSTACLES:
        show(f"  and {len(obstacles) - MOST_OBSTACLES} more")
    if any("cannot be looked into" in obstacle for obstacle in obstacles):
        show("  A process may look into all others if it has CAP_SYS_PTRACE (docker run --cap-add SYS_PTRACE).")


def _explain() -> str:
    return (
        f"devguard doctor: no file was removed. Processes of another pid namespace (other containers with the same "
        f"{FOLDER}) look from here as if they had ended. If no other pid namespace uses this {FOLDER}, say so: "
        f"devguard doctor --reap {STATEMENT}"
    )


def _as_dict(plan: Plan, removal: Removal, status: int) -> dict[str, Any]:
    return {
        "status": status,
        "folder": str(FOLDER),
        "orphans": [dataclasses.asdict(segment) for segment in plan.orphans],
        "kept": [{"name": segment.name, "reason": reason} for segment, reason in (*plan.kept, *removal.kept)],
        "obstacles": plan.obstacles or removal.obstacles,
        "removed": [{"name": segment.name, "bytes": segment.nbytes} for segment in removal.removed],
        "removed_bytes": sum(segment.nbytes for segment in removal.removed),
    }


def _describe(segment: Segment, *facts: str) -> str:
    """Return a line about an entry, its name last, because that may hold anything."""
    processes = {
        "ended": "has ended",
        "running": "is running",
        "reused": "is running, but started after the file was made",
    }
    known = [segment.maker or "maker unknown"]
    if segment.process is not None:
        known.append(f"process {segment.pid} {processes[segment.process]}")
    if segment.kind != "file":
        known.append({"folder": "a folder", "link": "a link"}.get(segment.kind, "no regular file"))
    if segment.uid != os.geteuid():
        known.append(f"of uid {segment.uid}")
    text = ", ".join([f"{_format_age(segment.age_s)} old", *known, *facts])
    return f"{format_size(segment.nbytes):>10}  {text}: {printable(segment.name)}"


def _format_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{int(seconds)} s"


def _count(number: int) -> str:
    return f"{number} entry" if number == 1 else f"{number} entries"


def _join(pids: Iterable[int]) -> str:
    return "process " + ", ".join(map(str, pids))
