"""Reads the state file of simulated GPUs: what each process, alive or dead, holds or held on each device.

csrc/state.c writes the file while processes run. Reading takes no lock, so the numbers of a live process are those of
the moment. `create` makes the empty file that the processes share; nothing else here writes.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import struct
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from devguard.errors import SimulationError
from devguard.support import command_name, process_stat

__all__ = ["create", "DEVICES", "DeviceState", "Limits", "limits", "ProcessState", "state", "uuid_of"]

# struct sim_state and struct sim_process of csrc/sim.h, version 1
MAGIC = b"DGSIMGPU"
VERSION = 1
DEVICES = 16
SLOTS = 512
HEADER = struct.Struct("<8sIIIIQQQ")
PROCESS = struct.Struct(f"<iIQQII256s{DEVICES * 5}Q")
SIZE = HEADER.size + SLOTS * PROCESS.size


@dataclasses.dataclass(frozen=True)
class DeviceState:
    """What one process holds, or held when it ended, on one simulated GPU.

    Attributes
    ----------
    index : int
        The device's physical index: CUDA_VISIBLE_DEVICES does not shift it.
    context : bool
        Whether the process has a primary context there; for a dead process, whether it had one.
    bytes : int
        Bytes of device memory that the process holds; for a dead process, that it held when it ended. The caching
        allocator's unused blocks count, as with ``nvidia-smi``; the context itself does not.
    peak_bytes : int
        The highest value of ``bytes``.
    allocations : int
        The number of allocations on the device, by cudaMalloc or cuMemCreate.
    launches : int
        The number of kernels launched on the device. Copies and memsets do not count.
    ipc_opens : int
        The number of opened memory handles from other processes, for memory on this device.
    """

    index: int
    context: bool
    bytes: int
    peak_bytes: int
    allocations: int
    launches: int
    ipc_opens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """One process that initialised CUDA on simulated GPUs.

    Attributes
    ----------
    pid : int
        Its process id.
    name : str
        DEVGUARD_SIM_NAME if its environment sets the variable, else a short form of its command line.
    alive : bool
        Whether the process still runs. The memory of a dead process is freed, but its record stays readable.
    devices : tuple of DeviceState
        One for each simulated GPU, by physical index, visible to the process or not.
    """

    pid: int
    name: str
    alive: bool
    devices: tuple[DeviceState, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return dataclasses.asdict(self)


class Limits(NamedTuple):
    """What holds for each simulated GPU of one state file.

    Attributes
    ----------
    memory : int
        Bytes of its memory.
    context_bytes : int
        Bytes that each context takes.
    """

    memory: int
    context_bytes: int


def limits(path: str | os.PathLike[str]) -> Limits:
    """Return the limits in a state file; raises SimulationError as `state` does."""
    return Limits(*HEADER.unpack_from(_read(Path(path)))[5:7])


def uuid_of(index: int) -> str:
    """Return the UUID of a simulated GPU, in torch's spelling. Matches csrc/state.c."""
    return str(uuid.UUID(bytes=b"devguard".ljust(15, b"\0") + bytes([index])))


def state(path: str | os.PathLike[str] | None = None) -> tuple[ProcessState, ...]:
    """Return what every process holds, or held when it ended, on every simulated GPU.

    Parameters
    ----------
    path : path, optional
        The state file. By default DEVGUARD_SIM_STATE names it.

    Returns
    -------
    tuple of ProcessState
        In the order in which the processes initialised CUDA. A file has room for 512 processes; if it is full, the
        oldest dead processes are dropped.

    Raises
    ------
    SimulationError
        If there is no such file, or it is not a state file of this version.
    """
    chosen = path if path is not None else os.environ.get("DEVGUARD_SIM_STATE")
    if not chosen:
        raise SimulationError(
            "no state file is given: pass its path, or call this in a process on simulated GPUs, where "
            "DEVGUARD_SIM_STATE names it"
        )
    raw = _read(Path(chosen))
    taken = HEADER.unpack_from(raw)[4]
    found = []
    for slot in range(min(taken, SLOTS)):
        record = PROCESS.unpack_from(raw, HEADER.size + slot * PROCESS.size)
        if record[0] > 0:
            found.append((record[2], _process(record)))
    return tuple(process for _, process in sorted(found, key=lambda pair: pair[0]))


def create(path: Path, *, memory: int, context_bytes: int) -> None:
    """Create an empty state file, or check an existing one.

    Parameters
    ----------
    path : Path
        The path of the file, in an existing folder.
    memory, context_bytes : int
        The bytes of memory of each device, and the bytes that a context takes.
    """
    header = HEADER.pack(MAGIC, VERSION, SLOTS, PROCESS.size, 0, memory, context_bytes, 0)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
            file.write(header)
            file.truncate(SIZE)
        try:
            os.link(scratch, path)  # A link appears complete or not at all, and never replaces an existing file.
        except FileExistsError:
            _read(path)
            _check_owner(path)
        finally:
            scratch.unlink()
    except OSError as error:
        raise SimulationError(
            f"the state file {path} cannot be created: {error.strerror}; choose another path"
        ) from error


def _read(path: Path) -> bytes:
    try:
        found = path.stat()  # A pipe would keep the reader waiting, and another file may be of any size.
        raw = path.read_bytes() if stat.S_ISREG(found.st_mode) and found.st_size == SIZE else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise SimulationError(f"the state file {path} cannot be read: {reason}") from error
    if len(raw) != SIZE or raw[: len(MAGIC)] != MAGIC:
        raise SimulationError(
            f"{path} is not a state file of simulated GPUs; `devguard sim --state FILE -- COMMAND` creates one"
        )
    version, slots, size = HEADER.unpack_from(raw)[1:4]
    if (version, slots, size) != (VERSION, SLOTS, PROCESS.size):
        raise SimulationError(
            f"{path} is a state file of version {version}, written by another release of devguard; this release reads "
            f"version {VERSION}"
        )
    return raw


def _check_owner(path: Path) -> None:
    """Refuse a state file of another user, because every program on simulated GPUs maps it into its memory."""
    owner = path.stat().st_uid
    if owner not in (os.geteuid(), 0):
        raise SimulationError(f"the state file {path} belongs to another user (uid {owner}); choose another path")


def _process(record: tuple[Any, ...]) -> ProcessState:
    pid, count, _serial, started, contexts, _reserved, command = record[:7]
    columns = [record[7 + DEVICES * k : 7 + DEVICES * (k + 1)] for k in range(5)]
    devices = tuple(
        DeviceState(i, bool(contexts >> i & 1), *(column[i] for column in columns)) for i in range(min(count, DEVICES))
    )
    words = [word.decode(errors="replace") for word in command.rstrip(b"\0").split(b"\0")]
    return ProcessState(pid, command_name.shorten(words), _start_time(pid) == started, devices)


def _start_time(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since boot; None if it has ended. Matches csrc/state.c."""
    try:
        fields = process_stat.read_fields(f"/proc/{pid}")
    except OSError:
        return None
    return None if fields[process_stat.STATE] in process_stat.ENDED else int(fields[process_stat.STARTED])
