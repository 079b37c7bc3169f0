"""The JSON objects in the files of a log folder, which may hold anything, because others may write there.

Only regular files are opened, never a link, a pipe or a device. A line that is too long, is not JSON or is no object is
named as damaged. Time and memory are bounded: of a file that no process of devguard can have written, only the
beginning is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from devguard.errors import ConfigError

__all__ = ["Cursor", "Damage", "list_files", "parse", "read_object", "read_objects"]

LONGEST_LINE = 4 << 20  # bytes; a line of devguard has some thousands
MOST_SKIPPED = 64 << 20  # bytes of one line that is too long
MOST_READ = 128 << 20  # bytes of one file
MOST_LINES = 250_000  # of one file
MOST_NAMED = 20  # damaged lines of one file that are named one by one


class Damage:
    """The places of one file that cannot be read.

    Parameters
    ----------
    file : str
        The name of the file.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._lines: list[int] = []
        self._more = 0
        self._reason = ""

    def add(self, line: int) -> None:
        """Add a line, from 1."""
        if len(self._lines) < MOST_NAMED:
            self._lines.append(line)
        else:
            self._more += 1

    def stop(self, reason: str) -> None:
        """Say why the rest of the file, or the whole file, is not read; empty if it is read after all."""
        self._reason = reason

    def places(self) -> list[str]:
        """Return the places as text, ``file:line``."""
        found = [f"{self.file}:{line}" for line in self._lines]
        found += [f"{self.file}: {self._more} more lines"] if self._more else []
        return found + ([f"{self.file}: {self._reason}"] if self._reason else [])


def list_files(folder: Path, suffix: str) -> list[str]:
    """Return the sorted names in `folder` that end with `suffix`, without those of folders.

    Raises
    ------
    ConfigError
        If it is no folder, or cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(each.name for each in entries if each.name.endswith(suffix) and not _is_folder(each))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is not a folder. Name the folder of DEVGUARD_LOG or of devguard run --log."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{folder} cannot be read: {reason}. Name a folder that you may read.") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


@dataclass
class Cursor:
    """How far a file has been read that a process still writes.

    Attributes
    ----------
    offset : int
        Where the next line begins, in bytes.
    line : int
        The number of lines before it.
    start : int
        Where the line begins that was read last.
    is_done : bool
        Whether no more of the file is read, because it is too long for one of devguard.
    has_failed : bool
        Whether it could not be read the last time.
    """

    offset: int = 0
    line: int = 0
    start: int = 0
    is_done: bool = False
    has_failed: bool = False


def read_objects(file: Path, damage: Damage, cursor: Cursor | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line, from 1, and the JSON object in it; add lines that hold none to `damage`.

    Parameters
    ----------
    file : Path
        The file.
    damage : Damage
        Its places that cannot be read.
    cursor : Cursor, optional
        Where to go on, which is changed; a last line that has no end yet is then left for the next call.
    """
    at = Cursor() if cursor is None else cursor
    if at.has_failed:
        at.has_failed = False
        damage.stop("")
    try:
        with _open(file) as opened:
            opened.seek(at.offset)
            while not at.is_done and (line := opened.readline(LONGEST_LINE)):
                if cursor is not None and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return
                at.line, at.start, at.offset = at.line + 1, at.offset, at.offset + len(line)
                if at.line > MOST_LINES or at.offset > MOST_READ:
                    damage.stop(f"only its beginning is read, up to line {at.line - 1}: the file is too long for a log")
                    at.is_done = True
                elif len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    damage.add(at.line)
                    at.is_done = not _skip_line(opened)
                    at.offset = opened.tell()
                    if at.is_done:
                        damage.stop(f"only its beginning is read, because line {at.line} does not end")
                elif line.strip():
                    found = _parse(line)
                    if found is None:
                        damage.add(at.line)
                    else:
                        yield at.line, found
    except OSError as error:
        at.has_failed = True
        damage.stop(error.strerror or str(error))


def read_object(file: Path, offset: int) -> dict[str, Any] | None:
    """Return the JSON object in the line at `offset`, which may have been overwritten; None if there is none."""
    try:
        with _open(file) as opened:
            opened.seek(offset)
            return _parse(opened.readline(LONGEST_LINE))
    except OSError:
        return None


def _open(file: Path) -> BinaryIO:
    """Open a regular file, without a wait for what another process may write to it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not stat.S_ISREG(os.lstat(file).st_mode):  # Opening a device may do something to it.
        raise OSError(0, "not a regular file, so it is not read")
    opened = open(os.open(file, flags), "rb")  # noqa: SIM115 - returned to a `with` statement
    if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        return opened
    opened.close()
    raise OSError(0, "not a regular file, so it is not read")


def _skip_line(opened: BinaryIO) -> bool:
    """Read to the end of the line; return whether there is one within the bound."""
    for _ in range(MOST_SKIPPED // LONGEST_LINE):
        part = opened.readline(LONGEST_LINE)
        if not part or part.endswith(b"\n"):
            return True
    return False


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line, or None."""
    try:
        found = parse(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def parse(text: bytes) -> Any:
    """Return the value of a JSON text that others wrote; raise ValueError if it is none, or has a huge number."""
    try:
        return json.loads(text.decode(errors="replace"), parse_int=_parse_int, parse_constant=_refuse)
    except RecursionError:  # brackets in brackets in brackets
        raise ValueError("it is nested too deeply") from None


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # Longer than 64 bits; to read a million digits takes minutes.
        raise ValueError("a number is too large")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
