"""Tags that a process without an accelerator passes on.

A router (SGLang's data-parallel controller is one) owns ``cpu``, unpickles requests and pickles them again
for others. What came from ``cuda:0`` is kept on its host; were it then pickled as a CPU tensor, the final
receiver would get a CPU tensor, which changes the program. So the storage remembers its tag, and a pickle
writes it again.

Only pickle writes it: ``torch.save`` writes what is true, ``cpu``. The tag lives on the storage object.
Views, ``detach``, ``Parameter`` and garbage collection keep it; whatever makes a new storage loses it:
``clone``, ``deepcopy``, ``cat``, numpy, and a multiprocessing queue, which sends shared memory.

torch's way to pickle a storage is watched from the first such storage on: a process that relays nothing pays nothing.
"""

from __future__ import annotations

import threading
from typing import Any

from devguard.support.patching import Patches

__all__ = ["count", "install", "keep", "status", "tag_of", "uninstall"]

# Before torch's own taggers (10 and up). Not a whole number: two equal priorities make torch compare
# functions and raise.
_PRIORITY = 4.875
_ATTRIBUTE = "_devguard_relay_tag"


class _Counts:
    """How many storages were kept with a tag, and how many pickles carried one on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept = 0
        self.relayed = 0


_counts = _Counts()
_writing = threading.local()
_registered: list[tuple[Any, ...]] = []
_to_watch: list[Patches] = []  # where the patches go, while the door is open and they are not made yet


def keep(storage: Any, tag: str) -> Any:
    """Leave a CPU storage where it is, and let it remember the tag with which it came.

    Parameters
    ----------
    storage : torch.UntypedStorage
        On the CPU.
    tag : str
        The device that the sender wrote, such as ``"cuda:0"``.
    """
    setattr(storage, _ATTRIBUTE, tag)
    with _counts.lock:
        _counts.kept += 1
        while _to_watch:
            _watch(_to_watch.pop())
    return storage


def tag_of(storage: Any) -> str | None:
    """Return the tag that a storage came with, None if it was not kept."""
    tag: str | None = getattr(storage, _ATTRIBUTE, None)
    return tag


def count() -> None:
    """Count a tag that was carried on by other means than a pickle."""
    with _counts.lock:
        _counts.relayed += 1


def status() -> dict[str, int]:
    """Return how many storages were kept and how many pickles carried a tag on."""
    return {"kept": _counts.kept, "relayed": _counts.relayed}


def install(patches: Patches) -> None:
    """Make pickles of storages write the tag that the storage remembers, as soon as one remembers any."""
    for kind in _reducing():
        patches.find(kind, "__reduce__")  # what is missing is said now, not when a tensor arrives
    with _counts.lock:
        if _counts.kept:  # before the doors were closed
            _watch(patches)
        else:
            _to_watch.append(patches)


def _reducing() -> list[type]:
    """Return the classes of torch by whose ``__reduce__`` storages are pickled."""
    import torch

    kinds = (torch.storage.TypedStorage, torch.storage.UntypedStorage)
    return [next(base for base in kind.__mro__ if "__reduce__" in vars(base)) for kind in kinds]


def _watch(patches: Patches) -> None:
    import torch

    for kind in _reducing():
        _patch_reduce(patches, kind)
    registry = torch.serialization._package_registry
    before = {id(row) for row in registry}
    torch.serialization.register_package(_PRIORITY, _tag, _pass_on)  # type: ignore[arg-type]
    _registered.extend(row for row in registry if id(row) not in before)


def uninstall() -> None:
    """Take our tagger out of torch's registry, which has no public way to do so."""
    import torch

    registry = torch.serialization._package_registry
    with _counts.lock:
        _to_watch.clear()
        while _registered:
            row = _registered.pop()
            registry[:] = [other for other in registry if other is not row]


def _patch_reduce(patches: Patches, kind: Any) -> None:
    original = patches.find(kind, "__reduce__")

    def __reduce__(self: Any) -> Any:
        untyped = getattr(self, "_untyped_storage", self)
        if not hasattr(untyped, _ATTRIBUTE):
            return original(self)
        _writing.storage = untyped
        try:
            reduced = original(self)
        finally:
            _writing.storage = None
        count()
        return reduced

    patches.replace(kind, "__reduce__", __reduce__)


def _tag(storage: Any) -> str | None:
    if storage is not getattr(_writing, "storage", None):
        return None
    tag: str = getattr(storage, _ATTRIBUTE)
    return tag


def _pass_on(storage: Any, location: str) -> None:
    """Restore nothing: a deserializer that returns None leaves it to the next."""
