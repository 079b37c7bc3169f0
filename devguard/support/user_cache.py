"""The user's cache: where it lies, and whether its contents may be executed.

devguard puts libraries and Python packages there that later processes load. Only this user and root may be able to
change them: each folder, symbolic link and file on the way is checked, by owner and mode, before anything is loaded.
What a cached file says about itself proves nothing.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from devguard.errors import DevGuardError
from devguard.support import private_folders

__all__ = ["check_file", "check_folder", "check_tree", "locate", "make_folder", "make_private"]

VARIABLE = "DEVGUARD_CACHE_DIR"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
MAX_LINKS = 40  # as many symbolic links as Linux follows in one path


def locate(name: str, error: type[DevGuardError]) -> Path:
    """Return the path of the folder `name` in the cache: ``$DEVGUARD_CACHE_DIR``, or a folder in the user's cache.

    Raises
    ------
    DevGuardError
        Of the class `error`, if the user has no home.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(os.path.abspath(named)) / name
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    if not os.path.isabs(base):  # The XDG specification says that a relative path is to be ignored.
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise error(f"this user has no home folder for a cache: set {VARIABLE} to a folder of your own")
    return Path(os.path.normpath(base)) / "devguard" / name


def make_folder(folder: Path, error: type[DevGuardError]) -> None:
    """Create a folder and its missing parents, for this user alone (mode 0700), and check the way to it.

    Raises
    ------
    DevGuardError
        Of the class `error`, if others could change its contents.
    OSError
        If it cannot be created.
    """
    present = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    _check_way(present, error, final=present == folder)
    private_folders.make(folder)
    check_folder(folder, error)  # also of what another process has made meanwhile


def make_private(folder: Path) -> None:
    """Take from others the permission to write to the files and folders in `folder`, which this user has just made."""
    for _, entry, found in _entries(folder):
        if _is_open_to_others(found.st_mode):
            os.chmod(entry, stat.S_IMODE(found.st_mode) & ~WRITABLE_BY_OTHERS)


def check_folder(folder: Path, error: type[DevGuardError]) -> None:
    """Check that only this user and root can change which files the folder holds, and that it is a folder.

    Raises
    ------
    DevGuardError
        Of the class `error`; the message names the path, its owner and what to do.
    OSError
        If there is no such folder.
    """
    if not stat.S_ISDIR(_check_way(folder, error).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def check_file(file: Path, error: type[DevGuardError]) -> None:
    """Check that `file` is a file that only this user and root can change; raises as `check_folder` does."""
    if not stat.S_ISREG(_check_way(file, error).st_mode):
        raise error(f"{file} is not a regular file, so it is not loaded: remove it, and run the command again")


def check_tree(folder: Path, error: type[DevGuardError]) -> dict[str, int]:
    """Check a folder and everything in it; return the size of each file, by its path in the folder.

    Raises
    ------
    DevGuardError, OSError
        As `check_folder` does.
    """
    check_folder(folder, error)
    sizes = {}
    for name, entry, found in _entries(folder):
        if stat.S_ISLNK(found.st_mode):
            _check_way(Path(entry), error)
        else:
            _check(entry, found, error, remove=folder)
        if not stat.S_ISDIR(found.st_mode):
            sizes[name] = found.st_size
    return sizes


def _entries(folder: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield all that lies in a folder, at any depth: its path in the folder, its path, and its state."""
    waiting = [""]
    while waiting:
        base = waiting.pop()
        with os.scandir(folder / base) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                name = os.path.join(base, entry.name)
                yield name, entry.path, found
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(name)


def _check_way(path: Path, error: type[DevGuardError], *, final: bool = True) -> os.stat_result:
    """Check each folder, link and file from the root to `path`; return the state of what `path` leads to.

    With `final`, `path` holds what is loaded, or is loaded itself. Only above it, a folder with the sticky bit, such as
    ``/tmp``, may be writable by others, because they cannot replace there what belongs to this user.
    """
    here = "/"
    todo = list(reversed(path.parts[1:]))
    links = 0
    while todo:
        part = todo.pop()
        step = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        found = os.lstat(step)
        _check(step, found, error)
        if not stat.S_ISLNK(found.st_mode):
            here = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        here = "/" if target.is_absolute() else here
        todo += [part for part in reversed(target.parts) if part != "/"]
    found = os.lstat(here)
    if final:
        _check(here, found, error, remove=path)
    return found


def _check(path: str, found: os.stat_result, error: type[DevGuardError], *, remove: Path | None = None) -> None:
    """Check the owner and the mode of one folder, link or file.

    `remove` is what the user can remove, because it is built again; None for a folder or link on the way to it.
    """
    trusted = {os.geteuid(), 0}
    if remove is None:
        trusted.add(os.stat("/").st_uid)  # Inside a user namespace, root of the machine has another number.
    mode = found.st_mode
    if found.st_uid not in trusted:
        problem = f"belongs to {_name(found.st_uid)}, not to {_name(os.geteuid())}, the user of this process"
        remedy = ""
    elif _is_open_to_others(mode) and not (remove is None and mode & stat.S_ISVTX):
        problem = f"belongs to {_name(found.st_uid)}, and others can write to it (mode {stat.S_IMODE(mode):04o})"
        remedy = f", or run `chmod go-w {path}`"
    else:
        return
    if remove is not None:
        remedy = f", or remove {remove}, which is then built again"
    raise error(
        f"{path} {problem}. Others may have changed what lies there, so devguard loads nothing from it. Set {VARIABLE} "
        f"to a folder that only you can write to{remedy}."
    )


def _is_open_to_others(mode: int) -> bool:
    """Return whether other users may write; the mode of a symbolic link means nothing."""
    return bool(mode & WRITABLE_BY_OTHERS) and not stat.S_ISLNK(mode)


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
