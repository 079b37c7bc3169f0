"""A log folder that is read again and again while its processes write: their states, samples and strays over time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devguard.logs import process_end
from devguard.logs.lines import Cursor, Damage, list_files, read_object, read_objects
from devguard.logs.reader import Merged, Process, read_line
from devguard.logs.values import MALFORMED, as_number, as_text_or_none, as_texts, as_time
from devguard.reporting import sampler
from devguard.reporting.log_file import SUFFIX
from devguard.support import process_identity

__all__ = ["Folder", "ProcessLog", "Sample", "State", "touch"]


@dataclass(frozen=True)
class Sample:
    """The GPU memory of one process at one moment.

    Attributes
    ----------
    time : float
        Seconds since 1970.
    memory : dict of str to tuple of int
        For each device of the process, such as ``"cuda:1"``, on which it has a context, the bytes that torch's
        allocator has given out, those that it holds, and the most that it had given out.
    strays : int
        The number of strays of the process so far.
    arenas : tuple of dict
        What each arena of `devguard.transport` in the process holds, as `transport.Arena` samples it.
    """

    time: float
    memory: dict[str, tuple[int, int, int]]
    strays: int
    arenas: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class State:
    """The owners and the contexts of one process from one moment on.

    Attributes
    ----------
    time : float
        Seconds since 1970.
    owner : str or None
        The owner of the process.
    owned, contexts, allowed : tuple of str
        As in `devguard.logs.reader.Process`.
    """

    time: float
    owner: str | None
    owned: tuple[str, ...]
    contexts: tuple[str, ...]
    allowed: tuple[str, ...]

    @property
    def owners(self) -> frozenset[str]:
        """All devices that the process owned."""
        return frozenset(self.owned) | ({self.owner} if self.owner else frozenset())


@dataclass
class ProcessLog:
    """The log of one process, as far as it has been read.

    Attributes
    ----------
    process : Process
        The process, as it last wrote.
    rows : dict of int to Merged
        Its strays, one for each call site, door and action; the counts are the newest.
    times : dict of int to float
        When the first stray of each row was, in seconds since 1970; 0.0 if that is not known.
    states : list of State
        In the order of time.
    samples : list of Sample
        In the order of time.
    damage : Damage
        The lines that cannot be read.
    local_pid : int or None
        The number here of a process that runs in a container.
    """

    process: Process
    damage: Damage
    rows: dict[int, Merged] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    local_pid: int | None = None

    @property
    def state(self) -> State:
        """The newest state."""
        found = self.process
        return State(found.time, found.owner, tuple(found.owned), tuple(found.contexts), tuple(found.allowed))

    def uuids(self, tags: Iterable[str]) -> dict[str, str]:
        """Return the UUID of each device that the process saw, and of `tags`; one that it did not name is its tag."""
        gpus = self.process.gpus
        return gpus | {tag: tag for tag in {*tags} - gpus.keys()}

    @property
    def sample(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    @property
    def pid(self) -> int | None:
        """The number of the process here; None if it is a process of another machine, or cannot be found."""
        return self.process.pid if self.process.pid_space == process_identity.pid_space() else self.local_pid

    def is_running(self) -> bool:
        """Return whether the process ran at the last `Folder.update`, as far as this machine knows."""
        if self.local_pid is not None:
            return not self.process.ended and self.is_process(self.local_pid)
        return self.process.end == "running"

    def is_process(self, pid: int) -> bool:
        """Return whether the kernel's process `pid` is this one."""
        return process_identity.is_running(pid, self.process.started)

    def take(self, line: dict[str, Any]) -> bool:
        """Take one line of the log; return whether it is as log_file.py writes it."""
        try:
            self.read(line)
        except MALFORMED:
            return False
        return True

    def read(self, line: dict[str, Any]) -> None:
        """Take one line of the log; raises as `read_line` does."""
        if "now" in line:
            found = line["now"]
            memory = {str(tag): _three(numbers) for tag, numbers in found["memory"].items()}
            arenas = tuple(each for each in found.get("arenas", ()) if isinstance(each, dict))
            self.samples.append(Sample(as_time(line["time"]), memory, as_number(found["strays"]), arenas))
            return
        read_line(line, self.process, self.rows)
        if "stray" in line:
            self.times[as_number(line["stray"])] = as_time(line.get("time", 0.0))
        state = line.get("end", line.get("state"))
        if state is not None:
            owner, lists = as_text_or_none(state["process_owner"]), [state["owned"], state["contexts"]]
            owned, contexts, allowed = (tuple(as_texts(each)) for each in (*lists, state.get("allowed", [])))
            time = as_time(line["time"] if "state" in line else state["time"])
            self.states.append(State(time, owner, owned, contexts, allowed))


def _three(numbers: Any) -> tuple[int, int, int]:
    allocated, reserved, peak = numbers
    return as_number(allocated), as_number(reserved), as_number(peak)


class _File:
    """One file, and how far it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.journal = ProcessLog(Process(self.path.name, 0), Damage(self.path.name))
        self._cursor = Cursor()
        self._identity: tuple[int, int] | None = None
        self._changed: tuple[int, int] | None = None
        self._sample_at: int | None = None  # the offset of the newest sample, which may be overwritten
        self._rows: dict[int, int] = {}  # row -> the offset of its newest line, the counts of which change in place

    def update(self) -> None:
        """Read what is new."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return  # It was removed: what has been read stays.
        changed, identity = (found.st_mtime_ns, found.st_size), (found.st_dev, found.st_ino)
        if changed == self._changed and identity == self._identity and not self._cursor.has_failed:
            return
        if self._identity not in (None, identity) or found.st_size < self._cursor.offset:
            self._begin()  # It was copied here again, or has another content.
        self._identity = identity
        if self._changed is not None and self._changed[1] == found.st_size:
            self._read_sample()
        self._changed = changed
        for offset in self._rows.values():
            row = read_object(self.path, offset)
            if row is not None:
                self.journal.take(row)
        for number, line in read_objects(self.path, self.journal.damage, self._cursor):
            if not self.journal.take(line):
                self.journal.damage.add(number)
            elif "now" in line:
                self._sample_at = self._cursor.start
            elif "stray" in line:
                self._rows[as_number(line["stray"])] = self._cursor.start

    def _read_sample(self) -> None:
        """Read the newest sample again: a log that has very many overwrites it."""
        line = None if self._sample_at is None else read_object(self.path, self._sample_at)
        newest = self.journal.sample
        if line is not None and newest is not None and line.get("time") != newest.time:
            self.journal.take(line)


class Folder:
    """A log folder. The first `update` raises as `devguard.logs.reader.read` does for a bad folder.

    Parameters
    ----------
    path : Path
        The folder that ``DEVGUARD_LOG`` named.

    Attributes
    ----------
    journals : list of ProcessLog
        What the last `update` returned.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, _File] = {}
        self.journals: list[ProcessLog] = []

    def update(self) -> list[ProcessLog]:
        """Read what the processes have written since the last call, and return all journals, in the order of time.

        Raises
        ------
        ConfigError
            If it is no folder, or cannot be listed.
        """
        for name in list_files(self.path, SUFFIX):
            if name not in self._files:
                self._files[name] = _File(self.path / name)
        for file in self._files.values():
            file.update()
        journals = [file.journal for file in self._files.values() if file.journal.process.pid or file.journal.rows]
        process_end.settle([journal.process for journal in journals])
        self.journals = sorted(journals, key=lambda journal: (journal.process.time, journal.process.file))
        return self.journals


def touch(folder: Path) -> bool:
    """Let the processes of a log folder write samples for the next seconds; return whether that is possible."""
    place = folder / sampler.WATCHED
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.utime(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
