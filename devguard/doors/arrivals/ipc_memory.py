"""Memory of another process: whether this process can open it, where it did, its possible owners and copies of it.

For the door ``ipc``. torch opens an allocation of another process once, for all storages in it, and caches it by its
handle alone, regardless of the device on which the allocation was opened.
"""

from __future__ import annotations

import sys
from typing import Any

from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.support import accelerator, forks

__all__ = ["copy", "copy_opened_elsewhere", "find_obstacle", "is_visible", "opened_on", "Receivers"]

_UUIDS = "If sender and receiver see different lists of devices, guard the sender with doors={'ipc': 'uuid'}."


class Receivers:
    """The owners under which this process may receive memory.

    Attributes
    ----------
    only : int
        The index of the only owner that any thread may have; -1 if there are several, or none. All owners that were
        ever entered count, and the process's owner, which is entered at its first stray if the environment named it.
    several : bool
        Whether two of the entered owners are GPUs: one may have opened, for good, the memory that the other receives.
    """

    __slots__ = ("_entered", "_lock", "only", "several")

    def __init__(self) -> None:
        self._entered: set[int] = set()
        self._lock = forks.new_lock(awaited=True)
        self.only = -1
        self.several = False

    def add(self, owner: Owner) -> None:
        """Add an owner that is about to be entered."""
        if owner.index not in self._entered:
            with self._lock:
                self._entered.add(owner.index)
                self.several = len(self._entered - {-1}) > 1
                self.update(process.owner)

    def update(self, owner: Owner | None) -> None:
        """Update `only` for the next owner of the process; the present one may be in force as well."""
        with self._lock:
            indices = self._entered | {one.index for one in (owner, process.owner) if one is not None}
            self.only = min(indices) if len(indices) == 1 else -1


def opened_on(handle: Any, *caches: Any) -> int | None:
    """Return the device on which this process has opened the allocation of `handle`; None if it has not.

    Parameters
    ----------
    handle : bytes
        The handle of the allocation.
    *caches : SharedCache
        Caches of the kind of ``torch.multiprocessing.reductions.shared_cache``.
    """
    for cache in caches:
        for key in list(cache):
            reference = cache.get(key) if isinstance(key, tuple) and key[0] == handle else None
            if reference is not None:
                storage = sys.modules["torch"].UntypedStorage._new_with_weak_ptr(reference.cdata)
                if storage is not None:
                    index: int = storage.device.index
                    return index
    return None


def is_visible(owner: Owner, index: Any) -> bool:
    """Return whether this process sees the device `index`; False for the owner ``cpu``, without a query."""
    return owner.index >= 0 and index is not None and index < accelerator.device_count()


def find_obstacle(owner: Owner, index: Any, empty: bool) -> str | None:
    """Return why memory on the device `index` cannot be opened with the owner current; None if it can."""
    if owner.index < 0:
        return "devguard does not copy to the host silently: copy in the sender, or call .cpu() in the receiver."
    if not is_visible(owner, index):
        which = "the sender's GPU" if index is None else f"the sender's cuda:{index}"
        seen = ", ".join(f"cuda:{i}" for i in range(accelerator.device_count()))
        return f"This process does not see {which} (it sees {seen}; see CUDA_VISIBLE_DEVICES). {_UUIDS}"
    if empty:
        return None
    if not accelerator.can_access_peer(owner.index, index):
        return f"{owner.tag} has no peer access to cuda:{index}, so opening the memory needs a context there."
    return None


def copy(tensor: Any, owner: Owner) -> Any:
    """Return a copy of `tensor` on the owner, of the same kind."""
    return _as_kind_of(tensor, tensor.detach().to(owner.tag, copy=True))


def copy_opened_elsewhere(cache: Any, key: tuple[Any, ...], rebuild: Any, args: tuple[Any, ...]) -> Any:
    """Return a copy, on the owner, of memory that is open on another device.

    torch returns the pointer that it has, whichever device is requested, and the owner's kernels may not be able to
    follow it. So the driver copies the whole storage, within one device as torch sees it: a copy from one device to
    another makes torch (2.13) open a context on every device.

    Parameters
    ----------
    cache : SharedCache
        torch's cache.
    key : tuple
        The storage's key there: handle and offset.
    rebuild : callable
        torch's ``rebuild_cuda_tensor``.
    args : tuple
        The arguments of `rebuild`, with the owner as the device.
    """
    torch = sys.modules["torch"]
    known = cache.pop(key, None)  # otherwise torch returns this storage, which reports the other device
    try:
        tensor = rebuild(*args)
    finally:
        if known is not None:
            cache[key] = known
    copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    copied.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return _as_kind_of(tensor, copied)


def _as_kind_of(tensor: Any, copied: Any) -> Any:
    """Return `copied` as the same kind of tensor as `tensor`."""
    parameter = sys.modules["torch"].nn.Parameter
    if isinstance(tensor, parameter):
        return parameter(copied, requires_grad=tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)
