"""Device tags that a process with the owner ``cpu`` passes on, for the door ``load``.

A router, for example SGLang's data-parallel controller, owns ``cpu``, unpickles requests and pickles them again. A
tensor from ``cuda:0`` is kept on its host. Pickled as a CPU tensor, it would reach the final receiver as a CPU tensor,
which changes the program. So the storage object keeps its tag, and a pickle writes the tag again, where ``cpu`` is the
owner. ``torch.save`` does not: it writes ``cpu``, which is true.

Views, ``detach``, ``Parameter`` and garbage collection keep the tag; what creates a new storage loses it, and so does a
request for the host by name (host_requests.py). torch is patched when the first storage is kept. See docs/doors.md.
"""

from __future__ import annotations

import threading
from typing import Any

from devguard.doors.arrivals import host_requests
from devguard.ownership import in_force
from devguard.support import forks
from devguard.support.patching import Patches

__all__ = ["count", "install", "keep", "status", "tag_to_send", "uninstall"]

_DOOR = "load"
_ATTRIBUTE = "_devguard_relay_tag"


class _State:
    """What was relayed in this process, and what is patched for it.

    Attributes
    ----------
    lock : RLock
        Held while one of the others changes.
    kept : int
        How many storages were kept with a tag.
    relayed : int
        How many pickles carried a tag on.
    waiting : Patches or None
        The patches of the open door, until pickling is patched.
    """

    def __init__(self) -> None:
        self.lock = forks.new_lock(awaited=True)
        self.kept = 0
        self.relayed = 0
        self.waiting: Patches | None = None


_state = _State()
_writing = threading.local()


def keep(storage: Any, tag: str) -> Any:
    """Return a CPU storage with the tag with which it arrived.

    Parameters
    ----------
    storage : torch.UntypedStorage
        A storage on the CPU.
    tag : str
        The device that the sender wrote, such as ``"cuda:0"``.
    """
    setattr(storage, _ATTRIBUTE, tag)
    with _state.lock:
        _state.kept += 1
        if _state.waiting is not None:
            patches, _state.waiting = _state.waiting, None
            _patch_pickling(patches)
    return storage


def tag_to_send(storage: Any) -> str | None:
    """Return the tag with which a storage arrived; None if it did not, or if this is no place to pass it on."""
    tag: str | None = getattr(storage, _ATTRIBUTE, None)
    if tag is None:
        return None
    owner = in_force.owner()
    relays = owner is not None and owner.index < 0 and in_force.mode_of(_DOOR) == "repair"
    return tag if relays else None


def count() -> None:
    """Count a tag that was passed on."""
    with _state.lock:
        _state.relayed += 1


def status() -> dict[str, int]:
    """Return how many storages were kept and how many pickles carried a tag on."""
    return {"kept": _state.kept, "relayed": _state.relayed}


def install(patches: Patches) -> None:
    """Make pickles of storages write the tags that were kept: at once, or when the first one is kept."""
    for kind in _pickled_classes():
        patches.find(kind, "__reduce__")  # raises now, and not when a tensor arrives
    with _state.lock:
        if _state.kept:  # before the doors were closed
            _patch_pickling(patches)
        else:
            _state.waiting = patches


def _pickled_classes() -> list[type]:
    """Return the classes of torch that define the ``__reduce__`` of storages."""
    import torch

    kinds = (torch.storage.TypedStorage, torch.storage.UntypedStorage)
    return [next(base for base in kind.__mro__ if "__reduce__" in vars(base)) for kind in kinds]


def _patch_pickling(patches: Patches) -> None:
    import torch

    for kind in _pickled_classes():
        _patch_reduce(patches, kind)
    _patch_tagging(patches, torch.serialization)
    host_requests.patch(patches, lambda storage: hasattr(storage, _ATTRIBUTE))


def uninstall() -> None:
    """Leave pickling as it is if no storage was kept since the door opened."""
    with _state.lock:
        _state.waiting = None


def _patch_reduce(patches: Patches, kind: Any) -> None:
    original = patches.find(kind, "__reduce__")

    def __reduce__(self: Any) -> Any:
        untyped = getattr(self, "_untyped_storage", self)
        tag = tag_to_send(untyped)
        if tag is None:
            return original(self)
        _writing.storage, _writing.tag = untyped, tag
        try:
            reduced = original(self)
        finally:
            _writing.storage = None
        count()
        return reduced

    patches.replace(kind, "__reduce__", __reduce__)


def _patch_tagging(patches: Patches, serialization: Any) -> None:
    """Replace the function that finds the tag of a storage.

    Not a row in torch's registry of taggers: to remove a row again shifts the others under a load of another thread.
    """
    original = patches.find(serialization, "location_tag")

    def location_tag(storage: Any) -> Any:
        if storage is getattr(_writing, "storage", None):
            return _writing.tag
        return original(storage)

    patches.replace(serialization, "location_tag", location_tag)
