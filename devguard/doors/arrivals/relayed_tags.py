"""Device tags that a process with the owner ``cpu`` passes on, for the door ``load``.

A router, for example SGLang's data-parallel controller, owns ``cpu``, unpickles requests and pickles them again. A
tensor from ``cuda:0`` is kept on its host. Pickled as a CPU tensor, it would reach the final receiver as a CPU tensor,
which changes the program. So the storage object keeps its tag, and a pickle writes the tag again. ``torch.save`` does
not: it writes ``cpu``, which is true.

Views, ``detach``, ``Parameter`` and garbage collection keep the tag. ``clone``, ``deepcopy``, ``cat``, numpy and
multiprocessing queues (which send shared memory) create a new storage and lose the tag. torch's pickling is patched
when the first storage is kept, so other processes have no overhead.
"""

from __future__ import annotations

import threading
from typing import Any

from devguard.support.patching import Patches

__all__ = ["count", "install", "keep", "status", "tag_of", "uninstall"]

# Before torch's own taggers (10 and up). It is not a whole number, because torch compares the functions of two equal
# priorities and raises.
_PRIORITY = 4.875
_ATTRIBUTE = "_devguard_relay_tag"


class _State:
    """What was relayed in this process, and what is patched for it.

    Attributes
    ----------
    lock : Lock
        Held while one of the others changes.
    kept : int
        How many storages were kept with a tag.
    relayed : int
        How many pickles carried a tag on.
    waiting : Patches or None
        The patches of the open door, until pickling is patched.
    registered : list
        The rows of devguard in torch's registry.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept = 0
        self.relayed = 0
        self.waiting: Patches | None = None
        self.registered: list[tuple[Any, ...]] = []


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


def tag_of(storage: Any) -> str | None:
    """Return the tag with which a storage arrived; None if `keep` was not called for it."""
    tag: str | None = getattr(storage, _ATTRIBUTE, None)
    return tag


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
    registry = torch.serialization._package_registry
    before = {id(row) for row in registry}
    torch.serialization.register_package(_PRIORITY, _tag_to_write, _pass_on)  # type: ignore[arg-type]
    _state.registered.extend(row for row in registry if id(row) not in before)


def uninstall() -> None:
    """Remove the tagger from torch's registry, which has no public function for that."""
    import torch

    registry = torch.serialization._package_registry
    with _state.lock:
        _state.waiting = None
        while _state.registered:
            row = _state.registered.pop()
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


def _tag_to_write(storage: Any) -> str | None:
    """Return the tag of the storage that this thread is pickling; None for others, which torch's taggers handle."""
    if storage is not getattr(_writing, "storage", None):
        return None
    tag: str = getattr(storage, _ATTRIBUTE)
    return tag


def _pass_on(storage: Any, location: str) -> None:
    """Return None, so that torch tries the next deserializer."""
