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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from devguard.ownership.resolve import LAUNCHERS

__all__ = ["Claim", "claim", "describe_clash", "folder", "is_enabled", "others", "release"]

VARIABLE = "DEVGUARD_RANK_LOCK"

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
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *rest = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else 0
    return None if state in (b"Z", b"X") else int(rest[18])


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
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder() / f"{uuid}.json", flags, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            living = [found for found in _read(file.read()) if _start_time(found.pid) == found.started]
            pid = os.getpid()
            rest = [found for found in living if found.pid != pid]
            own = [found for found in living if found.pid == pid] if keep else [new] if new else []
            file.seek(0)
            file.truncate()
            file.write(json.dumps([asdict(found) for found in (*rest, *own)]))
            file.flush()
        finally:
            # Closing the file is not enough: a child forked meanwhile holds the same lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    return rest


def _read(text: str) -> list[Claim]:
    """Return the claims in a file; none if the file was written only in part."""
    names = {field.name for field in fields(Claim)}
    try:
        rows = json.loads(text or "[]")
        return [Claim(**row) for row in rows if row.keys() == names]
    except (AttributeError, TypeError, ValueError):
        return []
