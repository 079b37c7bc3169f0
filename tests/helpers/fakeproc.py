"""A folder that looks like /proc, with the processes of a test in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

NAMESPACE = "pid:[1]"
NEVER = 2**22  # Linux gives out lower pids only, so no process has this one.


class FakeProc:
    """A stand-in for /proc; it holds this process, which has nothing open, and the processes that a test adds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.add(os.getpid())
        (path / "self").symlink_to(str(os.getpid()))
        self.mount("rw")

    def mount(self, options: str) -> None:
        (self.path / "self/mountinfo").write_text(f"22 1 0:5 / {self.path} rw - proc proc {options}\n")

    def add(self, pid: int, *, state: str = "S", namespace: str = NAMESPACE, root: str = "/", maps: str = "") -> Path:
        """Add a process, and return its folder."""
        place = self.path / str(pid)
        (place / "fd").mkdir(parents=True)
        (place / "ns").mkdir()
        (place / "ns/pid").symlink_to(namespace)
        (place / "root").symlink_to(root)
        (place / "maps").write_text(maps)
        (place / "comm").write_text("worker\n")
        (place / "stat").write_text(f"{pid} (a) b) {state} {' '.join(map(str, range(30)))}\n")
        return place

    def add_opaque(self, pid: int) -> Path:
        """Add a process that cannot be looked into."""
        place = self.add(pid)
        (place / "maps").unlink()
        (place / "maps").mkdir()  # Root may read any file, but no folder as if it were one.
        return place


def takes_leases(path: Path) -> bool:
    """Return whether the file system of a file has leases."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
