"""Folders in the user's cache that are complete or do not exist.

A folder is filled under a temporary name next to its final place, and renamed when it is complete. On every use, the
owner and the mode of each file are checked, so that no other user can have changed it (support/user_cache.py), and its
manifest is compared with the disk, so that an incomplete or damaged folder is not used. One process builds the folder
while others wait. The caller provides the contents.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from devguard.errors import SimulationError
from devguard.simgpu.progress import Reporter
from devguard.support import user_cache

__all__ = ["extra", "files", "FORMAT", "get", "whole"]

MANIFEST = "manifest.json"
FORMAT = 1


def get(root: Path, name: str, fill: Callable[[Path], None], report: Reporter) -> Path:
    """Return a folder, which is built first if it is missing or damaged.

    Parameters
    ----------
    root : Path
        The folder that contains all such folders.
    name : str
        The name of the folder; its contents never change.
    fill : callable
        Fills the empty folder that is its argument.
    report : Reporter
        Reports a wait for another process.

    Raises
    ------
    SimulationError
        If the folder cannot be built, and then nothing incomplete is left; or if other users can change it.
    """
    folder = root / name
    if whole(folder):
        return folder
    filelock = extra("filelock")
    try:
        user_cache.make_folder(root, SimulationError)
        lock = filelock.FileLock(root / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            report.say(f"another process is building {folder}; waiting for it")
            lock.acquire()
        try:
            if not whole(folder):
                _make(folder, fill)
        finally:
            lock.release()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SimulationError(
                f"the disk is full, so {folder} cannot be created; free about 2 GB, or set DEVGUARD_CACHE_DIR to a "
                "folder on another disk"
            ) from error
        raise SimulationError(
            f"{folder} cannot be created: {error}; set DEVGUARD_CACHE_DIR to a writable folder"
        ) from error
    return folder


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield every file and its size, without the bytecode that Python compiles later."""
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = os.path.join(base, name)
            yield os.path.relpath(path, folder), os.lstat(path).st_size


def whole(folder: Path) -> bool:
    """Return whether a folder holds exactly the files of its manifest, with their sizes, apart from bytecode.

    Raises
    ------
    SimulationError
        If other users can change one of the files.
    """
    try:
        sizes = user_cache.check_tree(folder, SimulationError)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        del sizes[MANIFEST]
        found = {name: size for name, size in sizes.items() if "__pycache__" not in name.split(os.sep)}
        return bool(manifest["format"] == FORMAT and manifest["files"] == found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def extra(name: str) -> Any:
    """Import a package of the extra ``sim``; `SimulationError` if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SimulationError(
            f"simulated GPUs need {name}: install the extra with `pip install 'torch-devguard[sim]'`"
        ) from error


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Build in a sibling folder, then rename it. The caller holds the lock, so old siblings are from dead processes."""
    prefix = f"{folder.name}.building-"
    for stale in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        fill(stage)
        manifest = {"format": FORMAT, "files": dict(sorted(files(stage)))}
        (stage / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        user_cache.make_private(stage)
        if os.path.lexists(folder):  # An existing folder is damaged here; otherwise it would have been used.
            os.rename(folder, Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent)) / "damaged")
        os.rename(stage, folder)
    finally:
        for left in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
