"""A file that this process appends to and overwrites in place, whatever the program does to its descriptors.

A program that closes all descriptors, as a daemon does, may then own a file under the number of this one. So each
write first checks that the descriptor is still the file, and otherwise opens the file again, if that is still there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from devguard.support import private_folders

__all__ = ["AppendFile"]

# Nonblocking, because another program may have put a pipe in the place of the file.
_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class AppendFile:
    """A new file of this user alone.

    Parameters
    ----------
    path : Path
        The path of the file; missing folders are made, also for this user alone.

    Raises
    ------
    OSError
        If the file cannot be created, or exists.
    """

    def __init__(self, path: Path) -> None:
        private_folders.make(path.parent)
        self.path = path
        self._descriptor = os.open(path, _FLAGS | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._second = -1  # pwrite appends to a file that is open for appending
        found = os.fstat(self._descriptor)
        self._identity = found.st_dev, found.st_ino

    def write(self, data: bytes) -> int | None:
        """Append `data` with one write, and return its offset; None if another writer came between.

        Raises
        ------
        OSError
            If that fails, or if the path is another file now.
        """
        before = self._size(self._descriptor)
        if before is None:
            self._descriptor, before = self._open(os.O_APPEND)
        if os.write(self._descriptor, data) < len(data):
            raise OSError(28, "No space left on device")
        return before if self._size(self._descriptor) == before + len(data) else None

    def overwrite(self, offset: int, data: bytes) -> bool:
        """Replace the bytes at `offset`; return whether the file is long enough. Raises as `write` does."""
        size = self._size(self._second)
        if size is None:
            self._second, size = self._open(0)
        return size >= offset + len(data) and os.pwrite(self._second, data, offset) == len(data)

    def close(self) -> None:
        """Close the file, unless the program has closed it; a later write opens it again."""
        for descriptor in (self._descriptor, self._second):
            if self._size(descriptor) is not None:
                os.close(descriptor)
        self._descriptor = self._second = -1

    def _open(self, flag: int) -> tuple[int, int]:
        """Return a descriptor, and the size of the file."""
        descriptor = os.open(self.path, _FLAGS | flag)
        size = self._size(descriptor)
        if size is None:
            os.close(descriptor)
            raise OSError(0, f"{self.path} is not the file that this process made there")
        return descriptor, size

    def _size(self, descriptor: int) -> int | None:
        """Return the size of the file; None if the descriptor is not, or no longer, this file."""
        if descriptor < 0:
            return None
        with contextlib.suppress(OSError):
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) == self._identity and stat.S_ISREG(found.st_mode):
                return found.st_size
        return None
