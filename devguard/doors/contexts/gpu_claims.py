"""Which processes of this machine own which physical GPU: one small file per GPU, in the user's runtime directory.

A process cannot see by itself that another rank of its job owns the same GPU. So each process that owns one claims it:
a line with its pid, its job and its local rank in a file that is named by the GPU's UUID. Claims of processes that have
died are dropped by the next one. ``DEVGUARD_RANK_LOCK=off`` switches it off.

The files lie in ``$XDG_RUNTIME_DIR/devguard``, else in a folder of the user's own under the temporary directory. What
cannot be written there is not claimed: nothing depends on it but an explanation.
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

__all__ = ["Claim", "claim", "clash", "enabled", "folder", "others", "release"]

VARIABLE = "DEVGUARD_RANK_LOCK"

# What is the same in all processes of one job and in no other: the first row that is set completely.
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
    """One process that owns one GPU.

    Attributes
    ----------
    pid, started : int
        The process, and its start time in clock ticks since boot: a pid is used again.
    job, local_rank : str
        Its place in what a launcher started; empty where no launcher says so.
    parent : str
        The process whose `multiprocessing` child it is; empty for others.
    index : int
        The GPU's index in that process.
    visible : str or None
        Its ``CUDA_VISIBLE_DEVICES``.
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


_claimed: dict[tuple[int, str], int] = {}  # this pid and the UUID -> index


def enabled() -> bool:
    """Tell whether GPUs are claimed at all."""
    return os.environ.get(VARIABLE, "").strip().lower() not in ("off", "0")


def folder() -> Path:
    """Return the folder of the claims, made if it is missing.

    Raises
    ------
    OSError
        If it cannot be made, or if it is somebody else's.
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
    mine = _mine(index)
    _claimed[mine.pid, uuid] = index
    return _update(uuid, mine)


def others(uuid: str) -> list[Claim]:
    """Return the claims of other living processes on the GPU `uuid`."""
    return _update(uuid, None, keep=True)


def release() -> None:
    """Take back the claims of this process."""
    pid = os.getpid()
    for owner, uuid in list(_claimed):
        del _claimed[owner, uuid]
        if owner == pid:  # else a fork brought it along
            try:
                _update(uuid, None)
            except OSError:
                continue  # the folder is gone, and the claim with it


def clash(other: Claim, index: int) -> str | None:
    """Say why `other` and this process should not own one GPU, which is ``cuda:<index>`` here; None if they may.

    Two local ranks of one job may not, nor two `multiprocessing` children of one parent that were told different
    things: another local rank, index or list of visible devices. Children that were told the same share it on purpose.
    """
    mine = _mine(index)
    ranks = {mine.local_rank, other.local_rank}
    if mine.job and mine.job == other.job and len(ranks) == 2 and "" not in ranks:
        return f"local rank {other.local_rank} of the same job ({mine.job})"
    told = (mine.local_rank, mine.index, mine.visible) != (other.local_rank, other.index, other.visible)
    if mine.parent and mine.parent == other.parent and told:
        return f"another child of the same parent (pid {mine.parent.partition(' ')[0]})"
    return None


def _mine(index: int) -> Claim:
    environ = os.environ
    pid = os.getpid()
    job = next((row for row in JOBS if all(environ.get(name) for name in row)), ())
    ranks = (environ.get(launcher.rank, "").strip() for launcher in LAUNCHERS)
    processes = sys.modules.get("multiprocessing.process")
    parent = processes and processes.parent_process()
    return Claim(
        pid=pid,
        started=_started(pid) or 0,
        job=", ".join(f"{name}={environ[name]}" for name in job),
        local_rank=next((rank for rank in ranks if rank and rank != "-1"), ""),
        parent=f"{parent.pid} {_started(parent.pid)}" if parent else "",
        index=index,
        visible=environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _started(pid: int) -> int | None:
    """Return when a living process was started, None if there is none; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *rest = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if os.path.exists("/proc/self/stat") else 0
    return None if state in (b"Z", b"X") else int(rest[18])


def _update(uuid: str, mine: Claim | None, *, keep: bool = False) -> list[Claim]:
    """Write the living claims on `uuid` anew, with `mine` for this process; `keep` keeps what it has there.

    Returns
    -------
    list of Claim
        Those of other processes.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder() / f"{uuid}.json", flags, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            living = [found for found in _read(file.read()) if _started(found.pid) == found.started]
            pid = os.getpid()
            rest = [found for found in living if found.pid != pid]
            own = [found for found in living if found.pid == pid] if keep else [mine] if mine else []
            file.seek(0)
            file.truncate()
            file.write(json.dumps([asdict(found) for found in (*rest, *own)]))
            file.flush()
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # by name: a fork meanwhile holds the same lock
    return rest


def _read(text: str) -> list[Claim]:
    """Return the claims in a file; none if it was left half written."""
    names = {field.name for field in fields(Claim)}
    try:
        rows = json.loads(text or "[]")
        return [Claim(**row) for row in rows if row.keys() == names]
    except (AttributeError, TypeError, ValueError):
        return []
