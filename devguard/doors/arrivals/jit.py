"""The door ``jit``: ``torch.jit.load`` without ``map_location`` puts each tensor on the device that the archive names.

A repair passes the owner as ``map_location``. ``torch.jit.load`` moves CPU tensors too then, so the load is repaired
only if the archive holds no CPU tensor, or if the owner is ``cpu``. An archive with tensors of both kinds is recorded
and left unchanged: load it with an explicit ``map_location``, and move its CPU tensors back by hand. An explicit
``map_location`` is obeyed, and recorded where it is not the owner's. See docs/doors.md.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any

from devguard.doors.arrivals.map_locations import is_away, place
from devguard.ownership import in_force
from devguard.ownership.owner import names_cuda
from devguard.reporting.advice import advise
from devguard.reporting.verdict import judge
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "jit"
_ADVICE = advise(NAME)

_patches = Patches()


class _State:
    """What the door has counted.

    Attributes
    ----------
    unread : int
        How many archives could not be read in advance.
    """

    def __init__(self) -> None:
        self.unread = 0


_state = _State()


def install() -> None:
    """Replace ``torch.jit.load``."""
    import torch

    original = _patches.find(torch.jit, "load")

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or in_force.mode_of(NAME) == "off":
            return original(f, map_location, *args, **kwargs)
        named = None if map_location is None else str(map_location)
        if named is not None and not is_away(named, owner):
            return original(f, map_location, *args, **kwargs)
        if not isinstance(f, (str, os.PathLike)):
            f = io.BytesIO(f.read())  # torch reads the whole stream too
        tags = _read_tags(f)
        if named is not None:
            used = place(NAME, named, owner, sum(tags.values()))
            return original(f, map_location if used is named else used, *args, **kwargs)
        away = sorted(tag for tag in tags if names_cuda(tag) and tag != owner.tag)
        if away:
            repairable = owner.index < 0 or "cpu" not in tags
            target = owner.tag if repairable else None
            nbytes = sum(tags[tag] for tag in away)
            if judge(NAME, ",".join(away), owner, nbytes, _ADVICE, target=target):
                map_location = owner.tag
        return original(f, map_location, *args, **kwargs)

    for module in (torch.jit, torch.jit._serialization):
        _patches.replace(module, "load", load)


def uninstall() -> list[str]:
    """Put ``torch.jit.load`` back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of ``torch.jit.load`` from before the door opened, and the number of unread archives."""
    return {"early_copies": _patches.early_copies(), "unread_archives": _state.unread}


def _read_tags(f: Any) -> dict[str, int]:
    """Return the device tags in a TorchScript archive, with the bytes of each; empty if it cannot be read.

    Parameters
    ----------
    f : path or io.BytesIO
        The archive. The position of a stream is restored.
    """
    tags: dict[str, int] = {}
    position = f.tell() if isinstance(f, io.BytesIO) else 0
    try:
        with zipfile.ZipFile(f) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            for name in archive.namelist():
                if name.endswith(("/data.pkl", "/constants.pkl")):
                    records = name.removesuffix(".pkl")  # the storages of archive/data.pkl are in archive/data/
                    _TagReader(io.BytesIO(archive.read(name)), tags, sizes, records).load()
    except (OSError, zipfile.BadZipFile):
        pass  # torch raises its own error
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError):
        _state.unread += 1  # a pickle of unknown structure must not break the load
    finally:
        if isinstance(f, io.BytesIO):
            f.seek(position)
    return tags


class _Opaque:
    """A stand-in for each class that a pickle names, so that nothing in the archive is imported or run."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _TagReader(pickle.Unpickler):
    """Adds up the bytes of the storages in a TorchScript pickle, by device tag."""

    def __init__(self, file: io.BytesIO, tags: dict[str, int], sizes: dict[str, int], records: str) -> None:
        super().__init__(file)
        self._tags = tags
        self._sizes = sizes
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for every class."""
        return _Opaque

    def persistent_load(self, identity: Any) -> Any:
        """Add the bytes of one storage, once."""
        _, _, key, location = identity[:4]
        size = self._sizes.pop(f"{self._records}/{key}", 0)
        self._tags[location] = self._tags.get(location, 0) + size
        return _Opaque()
