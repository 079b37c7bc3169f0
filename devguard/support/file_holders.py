"""Which processes have a file open or mapped, as far as /proc shows it, and why the picture may lack some of them.

/proc does not show processes of other pid namespaces, except those below this one, and no descriptor on its way through
a socket or of a thread that has left the table of its process. `is_open_elsewhere` asks the kernel, which knows all.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from devguard.support import process_stat

__all__ = ["find", "Holders", "is_open_elsewhere"]

_MAPPING = re.compile(rb"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) ([1-9]\d*) *(.*)$", re.MULTILINE)
_GONE = b" (deleted)"

Identity = tuple[int, int]  # device and inode


@dataclasses.dataclass(frozen=True)
class Holders:
    """The result of a look at all processes.

    Parameters
    ----------
    pids : dict
        The processes that have a file open or mapped, by its device and inode. A file without holders is not in it.
    obstacles : list of str
        Why a holder may be missing, one sentence each: a process that cannot be looked into, or one of another pid
        namespace that uses the same folder.
    """

    pids: dict[Identity, list[int]]
    obstacles: list[str]


def find(files: Mapping[Identity, str], folder: Path, proc: Path) -> Holders:
    """Look for the processes that have some files of a folder open or mapped.

    Parameters
    ----------
    files : mapping
        The name of each file in the folder, by its device and inode.
    folder : Path
        The folder.
    proc : Path
        Where the processes are: ``/proc``.
    """
    try:
        _check_proc(proc)
        look = _Look(files, folder, proc)
        pids = sorted(int(name) for name in os.listdir(proc) if name.isdecimal())
    except OSError as error:
        return Holders({}, [f"the processes cannot be looked into: {error.filename}: {error.strerror or error}."])
    for pid in pids:
        look.at(pid)
    return Holders({identity: sorted(found) for identity, found in look.pids.items()}, look.obstacles)


def is_open_elsewhere(descriptor: int) -> bool:
    """Ask the kernel whether the file is open or mapped through any other descriptor, in whatever namespace.

    The kernel grants a lease for writing only if it is not. Until the descriptor is closed, a process that opens the
    file has to wait. False also where the kernel or the file system has no leases.

    Parameters
    ----------
    descriptor : int
        A regular file of this user, opened for reading.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # The usual signal, SIGIO, would end this process.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EBUSY)
    return False


class _Look:
    """A look at one process after the other."""

    def __init__(self, files: Mapping[Identity, str], folder: Path, proc: Path) -> None:
        self.pids: dict[Identity, set[int]] = {}
        self.obstacles: list[str] = []
        self._files = files
        self._names = {os.fsencode(name): identity for identity, name in files.items()}
        self._folder, self._proc = folder, proc
        self._device = os.stat(folder).st_dev
        self._namespace = os.readlink(proc / "self/ns/pid")

    def at(self, pid: int) -> None:
        """Look at the files of a process; record why, if that is not possible."""
        place = self._proc / str(pid)
        try:
            tables = [place] if _is_running(place) else self._list_threads(place)
            for table in tables:
                self._look_at_table(table, pid)
        except OSError as error:
            self._record(pid, f"cannot be looked into: {error.strerror or error}.")

    def _look_at_table(self, table: Path, pid: int) -> None:
        try:
            for identity in (*self._find_mapped(table), *self._find_open(table)):
                self.pids.setdefault(identity, set()).add(pid)
            if os.readlink(table / "ns/pid") != self._namespace and self._has_folder(table):
                self._record(pid, f"runs in another pid namespace, and uses {self._folder} too.")
        except (FileNotFoundError, ProcessLookupError):
            if _is_running(table):  # otherwise it has ended meanwhile
                raise

    def _list_threads(self, place: Path) -> list[Path]:
        """Return the threads of a process that has ended, or the first thread of which has."""
        try:
            threads = [place / "task" / name for name in os.listdir(place / "task")]
            return [thread for thread in threads if _is_running(thread)]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def _find_mapped(self, table: Path) -> Iterator[Identity]:
        for major, minor, number, path in _MAPPING.findall((table / "maps").read_bytes()):
            identity = os.makedev(int(major, 16), int(minor, 16)), int(number)
            if identity in self._files:
                yield identity
            else:  # On overlayfs the device is another one than that of `stat`.
                named = self._find_name(path)
                if named is not None and named[1] == identity[1]:
                    yield named

    def _find_open(self, table: Path) -> Iterator[Identity]:
        for number in os.listdir(table / "fd"):
            link = os.fsencode(table / "fd" / number)
            try:
                if self._find_name(os.readlink(link)) is None:
                    continue  # A look at every file could hang, on a file system that does not answer.
                found = os.stat(link)
            except FileNotFoundError:  # It has just been closed.
                continue
            if (found.st_dev, found.st_ino) in self._files:
                yield found.st_dev, found.st_ino

    def _find_name(self, path: bytes) -> Identity | None:
        name = path.rpartition(b"/")[2]
        return self._names.get(name) or self._names.get(name.removesuffix(_GONE))

    def _has_folder(self, table: Path) -> bool:
        """Return whether the folder, as the process sees it, is on the same file system."""
        try:
            return os.stat(f"{table}/root{self._folder}").st_dev == self._device
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _record(self, pid: int, what: str) -> None:
        try:
            comm = (self._proc / str(pid) / "comm").read_text(encoding="utf-8", errors="surrogateescape")
            self.obstacles.append(f"process {pid} ({comm.rstrip()}) {what}")
        except OSError:
            self.obstacles.append(f"process {pid} {what}")


def _check_proc(proc: Path) -> None:
    """Raise OSError if `proc` shows other processes than those of this pid namespace, or may hide some."""
    if os.readlink(proc / "self") != str(os.getpid()):
        raise OSError(errno.ESRCH, "it shows another pid namespace", str(proc))
    for line in (proc / "self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, options = line.partition(" - ")
        hidden = re.search(r"\bhidepid=(?!0\b|off\b)\w+", options)
        if hidden and mount.split()[4] == str(proc):
            raise OSError(errno.EACCES, f"mounted with {hidden[0]}, it may hide some", str(proc))


def _is_running(place: Path) -> bool:
    """Return whether a process or thread, given by its folder in /proc, has not ended."""
    try:
        fields = process_stat.read_fields(place)
        return not fields or fields[process_stat.STATE] not in process_stat.ENDED
    except (FileNotFoundError, ProcessLookupError):
        return False
