"""Storages that a program opens from a CUDA IPC handle itself, for the door ``ipc``.

``UntypedStorage._new_shared_cuda`` is torch's one function that opens a handle. ``torch.multiprocessing`` calls it, and
so do transports of other projects, such as SGLang's and vLLM's. Mode ``repair`` opens the memory with the owner
current. Where the program has made the sender's device current, it has chosen that device, and the code after the call
needs the storage there: the call is obeyed and recorded as kept.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from devguard.doors.arrivals import ipc_memory
from devguard.doors.arrivals.ipc_memory import Receivers, find_obstacle, is_visible
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.verdict import judge, obey
from devguard.support import accelerator, forks
from devguard.support.patching import Patches

__all__ = ["already_judged", "install", "opened_on", "opening"]

NAME = "ipc"

_SIZE = 2  # the position of the size in bytes, after the device and the handle
_OFFSET = 3
_ADVICE = (
    "The handle names a GPU of the sender. Open it with the index of this process's own GPU, send CPU tensors, or let "
    "devguard do it (mode='repair')."
)

# Held from the look at open allocations until the opening, where several owners were entered.
opening = forks.new_lock()


class _Thread(threading.local):
    judged = False


_thread = _Thread()


class _State:
    """The storages that programs have opened themselves.

    Attributes
    ----------
    cache : SharedCache or None
        As torch keeps its own; None before the door is first opened.
    """

    def __init__(self) -> None:
        self.cache: Any = None


_state = _State()


@contextlib.contextmanager
def already_judged() -> Iterator[None]:
    """Return a context manager in which this thread opens handles without another judgement."""
    outer, _thread.judged = _thread.judged, True
    try:
        yield
    finally:
        _thread.judged = outer


def opened_on(handle: Any) -> int | None:
    """Return the device on which this process has opened the allocation of `handle`; None if it has not."""
    return ipc_memory.opened_on(handle, sys.modules["torch.multiprocessing.reductions"].shared_cache, _state.cache)


def install(patches: Patches, receivers: Receivers, is_copy_requested: Callable[[], bool]) -> None:
    """Replace ``_new_shared_cuda`` of the class to which its subclasses and typed storages lead."""
    import torch
    import torch.multiprocessing.reductions

    reductions: Any = torch.multiprocessing.reductions
    kind: Any = torch.UntypedStorage
    patches.find(kind, "_new_shared_cuda", inherited=True)
    original = kind._new_shared_cuda
    if _state.cache is None:
        _state.cache = reductions.SharedCache()

    def remembered(*args: Any) -> Any:
        storage = original(*args)
        _state.cache[args[1], args[_OFFSET]] = reductions.StorageWeakRef(storage)
        return storage

    def _new_shared_cuda(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) <= _OFFSET or type(args[0]) is not int or _thread.judged:
            return original(*args, **kwargs)
        owner = in_force.owner_at_door()
        if owner is None or (args[0] == owner.index and not receivers.several):
            return remembered(*args)
        receivers.add(owner)
        with opening:
            return _open(remembered, args, owner, is_copy_requested())

    patches.replace(kind, "_new_shared_cuda", _new_shared_cuda, inherited=True)


def _open(original: Callable[..., Any], args: tuple[Any, ...], owner: Owner, copies: bool) -> Any:
    """Open memory that is not the owner's, or that may be open on another owner's device."""
    index, handle, *rest = args
    opened = opened_on(handle) if owner.index >= 0 else None
    elsewhere = opened is not None and opened != owner.index
    if index == owner.index and not elsewhere:
        return original(*args)
    source = f"cuda:{opened if elsewhere else index}"
    nbytes = args[_SIZE] if isinstance(args[_SIZE], int) else 0
    if owner.index >= 0 and index != owner.index and _is_chosen(index):
        obey(NAME, source, owner, nbytes)
        return original(*args)
    reason = find_obstacle(owner, index, False)
    target = owner.tag if elsewhere or reason is None or (copies and is_visible(owner, index)) else None
    if elsewhere:
        reason = f"This process has already opened that memory on {source}. The owner gets a copy, not an alias."
    advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
    if not judge(NAME, source, owner, nbytes, advice, target=target, note=reason):
        return original(*args)
    if reason is not None and not elsewhere:  # a copy without peer access
        return original(*args).to(device=owner.tag)
    storage = original(owner.index, handle, *rest)
    return storage.clone() if copies or elsewhere else storage


def _is_chosen(index: int) -> bool:
    """Return whether the program has made the device `index` current."""
    return accelerator.current_device() == index and not accelerator.device_0_is_unchosen()
