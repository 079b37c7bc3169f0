"""Claims of physical GPUs: one small file per GPU lists the processes of this machine that own it.

A process cannot see alone that another rank of its job owns the same GPU. So each process claims its GPU: a line with
its pid, its job and its local rank, in a file named by the UUID of the GPU. The next process drops the claims of
processes that have died. ``DEVGUARD_RANK_LOCK=off`` switches claims off.

The files are in ``$XDG_RUNTIME_DIR/devguard``, else in a folder of the user under the temporary directory. If this
folder cannot be written, nothing is claimed: a claim only serves to explain a shared GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from devguard.ownership.resolve import LAUNCHERS
from devguard.support import process_stat

__all__ = ["Claim", "claim", "describe_clash", "folder", "is_enabled", "others", "release"]

VARIABLE = "DEVGUARD_RANK_LOCK"

LOCK_TRIES, LOCK_PAUSE_S = 40, 0.002
MAX_BYTES = 1 << 20  # thousands of claims

# The variables that identify a job; the first row of which all variables are set counts.
JOBS = (
    ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"),  # the run id alone is "none" by default
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ("PMIX_NAMESPACE",),  # Open MPI 5
    ("OMPI_MCA_ess_base_jobid",),  # Open MPI 4
    ("PALS_APID",),
    ("MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True)
class Claim:
    """The claim of one process on one GPU.

    Attributes
    ----------
    pid, started : int
        The process, and its start time in clock ticks since boot, because a pid is used again.
    job, local_rank : str
        The job, and the local rank in it; empty without a launcher that sets them.
    parent : str
        The parent of a `multiprocessing` child, and its start time; empty for other processes.
    index : int
        The index of the GPU in that process.
    visible : str or None
        The ``CUDA_VISIBLE_DEVICES`` of that process.
    """

    pid: int
    started: int
    job: str
    local_rank: str
    parent: str
    index: int
    visible: str | None

    def __str__(self) -> str:
        visible = "unset" if self.visible is None else repr(self.visible)
        rank = f"local rank {self.local_rank}, " if self.local_rank else ""
        return f"pid {self.pid} ({rank}cuda:{self.index} there, CUDA_VISIBLE_DEVICES {visible})"


_claimed: dict[tuple[int, str], int] = {}  # (pid of this process, UUID) -> index


def is_enabled() -> bool:
    """Return whether this process claims its GPUs."""
    return os.environ.get(VARIABLE, "").strip().lower() not in ("off", "0")


def folder() -> Path:
    """Return the folder of the claims; creates it if it is missing.

    Raises
    ------
    OSError
        If the folder cannot be created, or if another user owns it or can write to it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "devguard") if runtime else Path(tempfile.gettempdir(), f"devguard-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path} is not a folder that only this user can write to")
    return path


def claim(uuid: str, index: int) -> list[Claim]:
    """Claim the GPU `uuid`, which is ``cuda:<index>`` in this process; return the claims of other living processes."""
    own = _make_claim(index)
    _claimed[own.pid, uuid] = index
    return _update(uuid, own)


def others(uuid: str) -> list[Claim]:
    """Return the claims of other living processes on the GPU `uuid`."""
    return _update(uuid, None, keep=True)


def release() -> None:
    """Release the claims of this process."""
    pid = os.getpid()
    for owner, uuid in list(_claimed):
        del _claimed[owner, uuid]
        if owner == pid:  # Otherwise the claim belongs to the parent of this forked process.
            try:
                _update(uuid, None)
            except OSError:
                continue  # The folder is gone, and so is the claim.


def describe_clash(other: Claim, index: int) -> str | None:
    """Describe the owner `other`, if that process and this one must not share one GPU, here ``cuda:<index>``.

    Two local ranks of one job must not share a GPU, nor two `multiprocessing` children of one parent with different
    settings: local rank, index or list of visible devices. Children with the same settings share a GPU on purpose.

    Returns
    -------
    str or None
        None if the two may share the GPU.
    """
    own = _make_claim(index)
    ranks = {own.local_rank, other.local_rank}
    if own.job and own.job == other.job and len(ranks) == 2 and "" not in ranks:
        return f"local rank {other.local_rank} of the same job ({own.job})"
    differ = (own.local_rank, own.index, own.visible) != (other.local_rank, other.index, other.visible)
    if own.parent and own.parent == other.parent and differ:
        return f"another child of the same parent (pid {own.parent.partition(' ')[0]})"
    return None


def _make_claim(index: int) -> Claim:
    """Return the claim of this process on ``cuda:<index>``."""
    environ = os.environ
    pid = os.getpid()
    job = next((row for row in JOBS if all(environ.get(name) for name in row)), ())
    ranks = (environ.get(launcher.rank, "").strip() for launcher in LAUNCHERS)
    processes = sys.modules.get("multiprocessing.process")
    parent = processes and processes.parent_process()
    return Claim(
        pid=pid,
        started=_start_time(pid) or 0,
        job=", ".join(f"{name}={environ[name]}" for name in job),
        local_rank=next((rank for rank in ranks if rank and rank != "-1"), ""),
        parent=f"{parent.pid} {_start_time(parent.pid)}" if parent else "",
        index=index,
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _start_time(pid: int) -> int | None:
    """Return the start time of a living process, None if there is no such process; 0 if the system has no ``/proc``."""
    try:
        found = process_stat.read_fields(Path("/proc", str(pid)))
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else 0
    return None if found[process_stat.STATE] in process_stat.ENDED else int(found[process_stat.STARTED])


def _update(uuid: str, new: Claim | None, *, keep: bool = False) -> list[Claim]:
    """Rewrite the file of the GPU `uuid`, without the claims of dead processes; return those of other processes.

    Parameters
    ----------
    uuid : str
        The GPU.
    new : Claim or None
        The claim of this process; None removes it.
    keep : bool
        Whether to keep the claim that this process has in the file.
    """
    path = folder() / f"{uuid}.json"
    # O_NONBLOCK, because opening a named pipe or a device can wait.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        _lock(descriptor)
        try:
            pid = os.getpid()
            living = _living(_read(_content(descriptor)))
            rest = [found for found in living if found.pid != pid]
            own = [found for found in living if found.pid == pid] if keep else [new] if new else []
            text = json.dumps([asdict(found) for found in (*rest, *own)]).encode()
            os.ftruncate(descriptor, os.pwrite(descriptor, text, 0))
        finally:
            # Closing the file is not enough: a child forked meanwhile holds the same lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
    return rest


def _living(claims: list[Claim]) -> list[Claim]:
    """Return the claims of living processes, the last of each; a process is looked up once, however many it has."""
    started = {pid: _start_time(pid) for pid in {found.pid for found in claims}}
    return list({found.pid: found for found in claims if started[found.pid] == found.started}.values())


def _lock(descriptor: int) -> None:
    """Lock a file; raise BlockingIOError if another process holds its lock for long, since a guard may not wait."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # other ranks that claim at the same time need less than a millisecond
            time.sleep(LOCK_PAUSE_S)
        else:
            return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _content(descriptor: int) -> bytes:
    """Return the bytes of a file; none if no list of claims is so long."""
    content = os.pread(descriptor, MAX_BYTES + 1, 0)
    return content if len(content) <= MAX_BYTES else b""


def _read(content: bytes) -> list[Claim]:
    """Return the claims in a file; none if it is damaged."""
    try:
        rows = json.loads(content.decode()) if content else []
        return [Claim(**row) for row in rows if _is_claim(row)]
    except (RecursionError, TypeError, ValueError):
        return []


def _is_claim(row: Any) -> bool:
    """Return whether `row` has the fields of a claim, with values of their types."""
    if not isinstance(row, dict) or row.keys() != {field.name for field in fields(Claim)}:
        return False
    numbers, texts = ("pid", "started", "index"), ("job", "local_rank", "parent")
    return (
        all(type(row[name]) is int and 0 <= row[name] < 1 << 63 for name in numbers)
        and all(isinstance(row[name], str) for name in texts)
        and isinstance(row["visible"], str | None)
    )
