"""Memory of another process that this process has open, who may have it, and copies of it; for the door ``ipc``.

torch opens an allocation of another process once, for all storages in it, and remembers it by its handle alone,
whatever the device under which it was opened.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from devguard.ownership.owner import Owner
from devguard.ownership.process import process

__all__ = ["Receivers", "copy", "copy_anew", "opened_on"]


class Receivers:
    """The owners under which this process may receive memory.

    Attributes
    ----------
    only : int
        The index of the only one that any thread may have: those that were ever entered, and the process's, which is
        entered at its first stray if the environment named it. -1 if there are several, or none.
    several : bool
        Whether two that were entered are GPUs: one of them may have opened what the other receives, for good.
    """

    __slots__ = ("_entered", "_lock", "only", "several")

    def __init__(self) -> None:
        self._entered: set[int] = set()
        self._lock = threading.RLock()
        self.only = -1
        self.several = False
        release = self._lock.release
        os.register_at_fork(before=self._lock.acquire, after_in_parent=release, after_in_child=release)

    def enter(self, owner: Owner) -> None:
        """Take notice of who is about to be entered."""
        if owner.index not in self._entered:
            with self._lock:
                self._entered.add(owner.index)
                self.several = len(self._entered - {-1}) > 1
                self.give(process.owner)

    def give(self, owner: Owner | None) -> None:
        """Take notice of whom the process is given to: the one that it has may be in force as well."""
        with self._lock:
            indices = self._entered | {one.index for one in (owner, process.owner) if one is not None}
            self.only = min(indices) if len(indices) == 1 else -1


def opened_on(cache: Any, handle: Any) -> int | None:
    """Return the device under which this process has the allocation of `handle` open; None if it has not.

    Parameters
    ----------
    cache : SharedCache
        torch's own, ``torch.multiprocessing.reductions.shared_cache``.
    handle : bytes
        The allocation's.
    """
    for key in list(cache):
        if isinstance(key, tuple) and key[0] == handle:
            storage = sys.modules["torch.multiprocessing.reductions"].storage_from_cache(None, key)
            if storage is not None:
                index: int = storage.device.index
                return index
    return None


def copy(tensor: Any, owner: Owner) -> Any:
    """Return a copy of `tensor` on the owner, of the same kind."""
    return _like(tensor.detach().to(owner.device, copy=True), tensor)


def copy_anew(cache: Any, key: tuple[Any, ...], rebuild: Any, args: tuple[Any, ...]) -> Any:
    """Return a copy, on the owner, of memory that is open under another device.

    torch hands out the pointer that it has, whichever device is asked for. The owner's kernels may not follow it; so
    the storage is copied as a whole, by the driver, and within one device as torch sees it: a copy from one device to
    another makes torch (2.13) open a context on every device there is.

    Parameters
    ----------
    cache : SharedCache
        torch's own.
    key : tuple
        The storage's in it: handle and offset.
    rebuild : callable
        torch's ``rebuild_cuda_tensor``.
    args : tuple
        For it, with the owner as the device.
    """
    torch = sys.modules["torch"]
    known = cache.pop(key, None)  # else torch answers with the storage that says the other device
    try:
        tensor = rebuild(*args)
    finally:
        if known is not None:
            cache[key] = known
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    own.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return _like(own, tensor)


def _like(own: Any, tensor: Any) -> Any:
    """Return `own`, a copy of `tensor`, as the same kind of tensor."""
    parameter = sys.modules["torch"].nn.Parameter
    if isinstance(tensor, parameter):
        return parameter(own, requires_grad=tensor.requires_grad)
    return own.requires_grad_(tensor.requires_grad)
