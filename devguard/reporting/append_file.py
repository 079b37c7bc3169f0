"""A file to which this process appends lines, whatever the program does to its descriptors.

A program that closes all descriptors, as a daemon does, may then own a file under the number of this one. So each
write first checks that the descriptor is still the file, and otherwise opens the file again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["AppendFile"]

_FLAGS = os.O_WRONLY | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC


class AppendFile:
    """A new file of this user alone.

    Parameters
    ----------
    path : Path
        The path of the file; missing folders are made.

    Raises
    ------
    OSError
        If the file cannot be created, or exists.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        self._identity = _identity(self._descriptor)

    def write(self, data: bytes) -> None:
        """Append `data` with one write; raise OSError if that fails."""
        if not self._is_open():
            self._descriptor = os.open(self.path, _FLAGS)
            self._identity = _identity(self._descriptor)
        if os.write(self._descriptor, data) < len(data):
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        """Close the descriptor, unless the program has closed it; a later write opens the file again."""
        if self._is_open():
            os.close(self._descriptor)
        self._descriptor = -1

    def _is_open(self) -> bool:
        with contextlib.suppress(OSError):
            return self._descriptor >= 0 and _identity(self._descriptor) == self._identity
        return False


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino
