"""Folders in the user's cache that are whole or not there at all.

A folder is filled in a temporary sibling and renamed when it is whole, with a manifest of all its files that is
compared with the disk on every use; so a half-made or damaged one is never used. One process makes it, others wait for
its result. What goes into it is the caller's business.
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

__all__ = ["extra", "files", "FORMAT", "get", "whole"]

MANIFEST = "manifest.json"
FORMAT = 1


def get(root: Path, name: str, fill: Callable[[Path], None], report: Reporter) -> Path:
    """Find a folder, and make it if there is none that is whole.

    Parameters
    ----------
    root : Path
        Where such folders are kept.
    name : str
        The folder's name there; what is in it never changes.
    fill : callable
        Fills an empty folder, which it is given.
    report : Reporter
        Says that another process is being waited for.

    Raises
    ------
    SimulationError
        It cannot be made here; nothing half-made is left.
    """
    folder = root / name
    if whole(folder):
        return folder
    filelock = extra("filelock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(root / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            report.say(f"another process is making {folder}; waiting for it")
            lock.acquire()
        try:
            if not whole(folder):
                _make(folder, fill)
        finally:
            lock.release()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SimulationError(
                f"the disk is full while making {folder}; free about 2 GB, or name another disk in DEVGUARD_CACHE_DIR"
            ) from error
        raise SimulationError(
            f"{folder} cannot be made: {error}; name a folder that can be written in DEVGUARD_CACHE_DIR"
        ) from error
    return folder


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """Every file and its size; what Python compiles later does not count."""
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = os.path.join(base, name)
            yield os.path.relpath(path, folder), os.lstat(path).st_size


def whole(folder: Path) -> bool:
    """Whether all files are there with their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["format"] == FORMAT and all(
            os.lstat(folder / name).st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
    """Build in a sibling folder, then rename. The caller holds the lock: siblings that are there belong to the dead."""
    prefix = f"{folder.name}.building-"
    for stale in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        fill(stage)
        manifest = {"format": FORMAT, "files": dict(sorted(files(stage)))}
        (stage / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        os.chmod(stage, 0o755)
        if folder.exists():  # damaged, or it would have been used
            os.rename(folder, Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent)) / "damaged")
        os.rename(stage, folder)
    finally:
        for left in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
