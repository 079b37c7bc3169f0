"""Files in the folder of POSIX shared memory: size, age, and what their names say about their makers.

It opens no file and removes nothing. Some names carry the pid of the process that made the file; that pid counts in the
pid namespace of that process. A file that no process has mapped may still be in flight: senders close a segment before
a reader opens it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import time
from pathlib import Path

from devguard.support import process_stat

__all__ = ["describe", "FOLDER", "has_ended", "PROC", "read_name", "read_state", "scan", "Segment"]

FOLDER = Path("/dev/shm")
PROC = Path("/proc")
HIGHEST_PID = 2**22  # PID_MAX_LIMIT of Linux
CLOCK_ERROR_S = 2.0  # The start of a process is known to a second or two.

_PID = "(?P<pid>[1-9][0-9]{0,6})"
# The whole name -> its maker. A pid is taken only from schemes that were read in the source of the maker.
_SCHEMES = [
    (re.compile(scheme, re.ASCII), maker)
    for scheme, maker in (
        (rf"torch_{_PID}_\d+_\d+", "torch"),  # ATen/MapAllocator.cpp, NewProcessWideShmHandle
        (rf"torch_{_PID}_\d+", "torch"),  # older releases (pytorch 30225)
        (rf"sgl_shm_\w+_{_PID}_[0-9a-f]{{8}}", "SGLang"),  # make_shm_name, SGLang 0.5.23
        (rf"multi_tokenizer_args_{_PID}", "SGLang"),
        (rf"pym-{_PID}-[a-z0-9_]+", "multiprocessing"),  # multiprocessing.heap.Arena
        (rf"sem\.loky-{_PID}-[a-z0-9_]+", "joblib"),  # loky.backend.synchronize.SemLock
        (r"sglang_.*|sgldiffusion-.*", "SGLang"),
        (r"psm_[0-9a-f]{8}", "multiprocessing.shared_memory"),  # also vLLM's, and that of older releases of SGLang
        (r"VLLM_OBJECT_STORAGE_SHM_BUFFER.*|vllm_.*", "vLLM"),
        (r"nccl-\w{6}", "NCCL"),
        (r"cuda\.shm\..*", "CUDA driver"),  # It holds numbers, but NVIDIA documents no format.
        (r"sem\.mp-.*", "multiprocessing"),
        (r"sem\..*", "a semaphore"),
    )
]
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


@dataclasses.dataclass(frozen=True)
class Segment:
    """One entry of the folder.

    Parameters
    ----------
    name : str
        Its name, which may hold anything; bytes that are no UTF-8 are surrogates.
    kind : str
        ``"file"``, ``"folder"``, ``"link"`` or ``"other"``.
    identity : tuple of int
        Device and inode.
    size, nbytes : int
        The length of the file, and the bytes of memory that it occupies.
    changed : float
        When it was last made, changed or renamed, in seconds since the epoch. Writes through a mapping do not count.
    age_s : float
        Seconds since then; never negative.
    uid, links : int
        The owner, and the number of names.
    maker : str or None
        What makes names of this form.
    pid : int or None
        The pid in the name.
    process : str or None
        ``"ended"``, ``"running"``, or ``"reused"`` if the process of that pid started after `changed`; None without a
        pid. Seen from this pid namespace.
    """

    name: str
    kind: str
    identity: tuple[int, int]
    size: int
    nbytes: int
    changed: float
    age_s: float
    uid: int
    links: int
    maker: str | None
    pid: int | None
    process: str | None


def read_name(name: str) -> tuple[str | None, int | None]:
    """Return the maker of names of this form, and the pid that the name carries; None where that is unknown."""
    for scheme, maker in _SCHEMES:
        found = scheme.fullmatch(name)
        if found:
            pid = int(found.groupdict().get("pid") or 0)
            return maker, pid if 0 < pid <= HIGHEST_PID else None
    return None, None


def scan(folder: Path = FOLDER, *, now: float | None = None, proc: Path = PROC) -> list[Segment]:
    """Return the entries of the folder, not of the folders in it: most bytes first.

    Parameters
    ----------
    folder : Path
        The folder.
    now : float, optional
        The time from which ages count; the current time by default.
    proc : Path
        Where the start times of processes are.

    Raises
    ------
    OSError
        If the folder is missing or cannot be read.
    """
    now = time.time() if now is None else now
    boot = _boot_time(proc)
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                state = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # It has just been removed.
                continue
            found.append(describe(entry.name, state, now=now, boot=boot, proc=proc))
    return sorted(found, key=lambda segment: (-segment.nbytes, segment.name))


def describe(name: str, state: os.stat_result, *, now: float, boot: float | None = None, proc: Path = PROC) -> Segment:
    """Return the entry `name`, the state of which is `state`."""
    maker, pid = read_name(name)
    changed = max(state.st_mtime, state.st_ctime)
    return Segment(
        name=name,
        kind=_KINDS.get(stat.S_IFMT(state.st_mode), "other"),
        identity=(state.st_dev, state.st_ino),
        size=state.st_size,
        nbytes=state.st_blocks * 512,
        changed=changed,
        age_s=max(0.0, now - changed),
        uid=state.st_uid,
        links=state.st_nlink,
        maker=maker,
        pid=pid,
        process=None if pid is None else _find_process(pid, changed, boot, proc),
    )


def has_ended(pid: int, proc: Path = PROC) -> bool:
    """Return whether this pid namespace has no process or thread of that pid, or one that waits to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # It belongs to another user.
        pass
    if read_state(pid, proc)[0] not in process_stat.ENDED:
        return False
    try:  # The first thread of a process may end before the others.
        return os.listdir(proc / str(pid) / "task") == [str(pid)]
    except OSError:
        return False


def read_state(pid: int, proc: Path = PROC) -> tuple[str | None, int | None]:
    """Return the state of a process or thread, such as ``"R"``, and its start in clock ticks since boot.

    Both are None where that is unknown.
    """
    try:
        fields = process_stat.read_fields(proc / str(pid))
        return fields[process_stat.STATE], int(fields[process_stat.STARTED])
    except (OSError, IndexError, ValueError):
        return None, None


def _find_process(pid: int, changed: float, boot: float | None, proc: Path) -> str:
    if has_ended(pid, proc):
        return "ended"
    ticks = read_state(pid, proc)[1]
    if ticks is None or boot is None:
        return "running"
    return "reused" if boot + ticks / os.sysconf("SC_CLK_TCK") > changed + CLOCK_ERROR_S else "running"


def _boot_time(proc: Path) -> float | None:
    """Return when the machine started, in seconds since the epoch; None if that is unknown."""
    try:
        lines = (proc / "stat").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), None)
