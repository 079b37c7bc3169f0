"""The door ``ipc``: CUDA tensors and events that another process shares through ``torch.multiprocessing``.

What arrives is a handle to memory on one physical GPU, with the index that this GPU has *in the sender*. torch makes
that index current and opens the handle there. So a tensor from ``cuda:0`` gives every receiver a context on GPU 0, and
where sender and receiver see different lists of devices, the index means another GPU altogether.

Memory on the owner: nothing changes. Memory elsewhere:

- ``repair`` opens it with the owner current, where the owner has peer access to it. The tensor says that it is on the
  owner, is still an alias of the producer's memory, and no context is opened there.
- ``copy`` (a mode of this door only), and ``repair`` inside ``remap()``, copy the tensor to the owner and let go of
  the producer's memory at once. Two tensors of one storage become two copies. Without peer access the copy needs a
  context on the producer's GPU.
- Where another owner in this process (a thread with a guard of its own), or unguarded code, has opened the allocation
  that the memory is part of: torch opens one only once in a process, on one device. The owner gets a copy of the
  storage, and ``note`` says that it is one and why.
- What cannot be repaired is recorded, with the reason in ``note``, and left to torch. Mode ``error`` raises before
  anything is opened; the producer then keeps the memory, as for any message that nobody reads.
- The owner ``cpu`` gets no silent copy to the host: what arrives is recorded and left to torch.

An index is taken as torch takes it: of this process's own list. Between processes with different lists the sender says
``doors={"ipc": "uuid"}`` (a mode of this door only: ``repair``, and what is sent carries the GPU's UUID in place of its
index). The spelling is that of SGLang's ``monkey_patch_torch_reductions``; the receiver needs devguard's doors open, in
any mode, or, for tensors, SGLang's patch, because torch alone raises a ``TypeError`` for a UUID. Without that mode the
bytes stay torch's. A queue of ``torch.multiprocessing`` pickles on a thread of its own, which has the scopes that the
first ``put()`` was made in: say it of the process (``devguard.install``) or around all of the sender's work.

Not seen here: code that calls ``UntypedStorage._new_shared_cuda`` itself, and CUDA storages, which torch does not
send.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from devguard.doors.arrivals import ipc_memory
from devguard.errors import DeviceResolutionError
from devguard.modes import REPAIRING
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.prepare import on_prepare
from devguard.ownership.process import on_owner, process
from devguard.ownership.stack import changing, look_for_changes
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.patching import DoorError, Parameters, Patches

__all__ = ["install", "status", "uninstall"]

NAME = "ipc"

_patches = Patches()
_receivers = ipc_memory.Receivers()
_opening = threading.RLock()  # from the look at what is open to the opening; only where there are several owners
_indices: dict[str, int] = {}  # UUID -> index here; the list of a process does not change

# Where SGLang's monkey_patch_torch_reductions (and its copies elsewhere) keep torch's functions.
_KEPT = "_rebuild_cuda_tensor_original"
_KEPT_REDUCE = "_reduce_tensor_original"

_STORAGE = ("storage_device", "storage_handle", "storage_size_bytes", "storage_offset_bytes")
_EVENTS = ("rebuild_event", "_rebuild_event")  # torch 2.15 sends the second

_ADVICE = "Share memory of this process's own GPU, send CPU tensors, or let devguard open it there (mode='repair')."
_UUIDS = "If sender and receiver see different lists of devices, guard the sender with doors={'ipc': 'uuid'}."


def install() -> None:
    """Replace torch's functions that open a handle, and the one that makes it."""
    import torch
    from torch.multiprocessing import reductions

    _patch_tensors(reductions)
    present = [name for name in _EVENTS if name in vars(reductions)]
    if not present:
        _patches.find(reductions, _EVENTS[0])  # says what is missing
    for name in present:
        _patch_event(reductions, name)
    _patch_sending(torch.storage.TypedStorage, reductions)
    _patch_sending_events(torch.cuda.Event, reductions)
    on_prepare.append(_enter)
    on_owner.append(_receivers.give)
    _receivers.give(process.owner)


def uninstall() -> list[str]:
    """Put torch's functions back, also where another patch keeps ours as the one beneath it."""
    reductions = sys.modules.get("torch.multiprocessing.reductions")
    for row in list(_patches.replaced):
        _, name, original, ours = row
        if name != _KEPT and reductions is not None and vars(reductions).get(_KEPT) is ours:
            setattr(reductions, _KEPT, original)
            _patches.replaced.remove(row)
    if _enter in on_prepare:
        on_prepare.remove(_enter)
        on_owner.remove(_receivers.give)
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return who holds copies of torch's functions from before, and whether this thread sends UUIDs."""
    return {"early_copies": _patches.early_copies(), "sends_uuids": in_force.mode_of(NAME) == "uuid"}


def _enter(owner: Owner, says: Callable[[str], Any]) -> None:
    _receivers.enter(owner)


def _patch_tensors(reductions: Any) -> None:
    name = "rebuild_cuda_tensor"
    if _patches.find(reductions, name).__module__ != reductions.__name__ and _KEPT in vars(reductions):
        name = _KEPT  # SGLang's patch came first; pickles name its function, which calls this one
    original = _patches.find(reductions, name)
    if original.__module__ != reductions.__name__:
        raise DoorError(
            f"torch.multiprocessing.reductions.{name} was replaced by {original.__module__}.{original.__qualname__}, "
            "which devguard does not know. Enter the first guard, or call devguard.install(), before that."
        )
    parameters = Parameters(original, "tensor_size", "dtype", *_STORAGE)
    at, count = parameters.at["storage_device"], parameters.count
    receivers = _receivers

    def rebuild_cuda_tensor(*args: Any, **kwargs: Any) -> Any:
        if len(args) == count and args[at] == receivers.only and not changing:  # whoever asks owns it, or nobody
            return original(*args)
        owner = in_force.owner_at_door()
        if owner is not None:
            receivers.enter(owner)
        if changing:
            look_for_changes()
        if len(args) != count:  # pickle passes all of them by position
            args = parameters.positional(args, kwargs)
        index = args[at]
        if index.__class__ is int:
            if owner is None:
                return original(*args)
        elif not isinstance(index, str):
            return original(*args)  # nothing that this version of devguard knows
        if owner is None or (owner.index >= 0 and _index(index) == owner.index and not receivers.several):
            return original(*parameters.changed(args, "storage_device", _visible(index)))
        if receivers.several and owner.index >= 0:
            with _opening:
                return _receive(reductions, original, parameters, args, owner)
        return _receive(reductions, original, parameters, args, owner)

    _patches.replace(reductions, name, rebuild_cuda_tensor)


def _receive(reductions: Any, original: Any, parameters: Parameters, args: tuple[Any, ...], owner: Owner) -> Any:
    """Receive a tensor that is not on the owner, or may be open under another owner's device."""
    sent, handle = parameters.value(args, "storage_device"), parameters.value(args, "storage_handle")
    nbytes = parameters.value(args, "storage_size_bytes")
    index = _index(sent) if owner.index >= 0 else sent  # finding a UUID initialises CUDA: not for who owns the host
    empty = handle is None or nbytes == 0
    under = None if empty or owner.index < 0 else ipc_memory.opened_on(reductions.shared_cache, handle)
    elsewhere = under is not None and under != owner.index
    if index == owner.index and not elsewhere:
        return original(*parameters.changed(args, "storage_device", index))
    known = {"dtype": str(parameters.value(args, "dtype")), "shape": parameters.value(args, "tensor_size")}
    source = f"cuda:{under if elsewhere else index}" if isinstance(index, int) else f"GPU {sent}"
    reason = note = _hindrance(owner, index, empty)
    target = owner.tag if elsewhere or reason is None or (_copies() and _sees(owner, index)) else None
    if elsewhere:
        reason = note = f"This process has opened that memory under {source} already."
        if in_force.mode_of(NAME) in REPAIRING:
            note = f"{reason} The owner gets a copy of it, not an alias."
    advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
    if not judge(NAME, source, owner, nbytes or 0, advice, target=target, note=note, **known):
        try:
            return original(*parameters.changed(args, "storage_device", _visible(sent)))
        except RuntimeError as error:
            if _sees(owner, index) or owner.index < 0 or in_force.mode_of(NAME) == "off":
                raise
            raise DeviceResolutionError(f"ipc: {reason}") from error
    if elsewhere:
        key = handle, parameters.value(args, "storage_offset_bytes")
        args = parameters.changed(args, "storage_device", owner.index)
        return ipc_memory.copy_anew(reductions.shared_cache, key, original, args)
    tensor = original(*parameters.changed(args, "storage_device", index if reason else owner.index))
    return ipc_memory.copy(tensor, owner) if _copies() and not empty else tensor


def _sees(owner: Owner, index: Any) -> bool:
    """Tell whether this process sees the device `index`; it is not asked for who owns the host."""
    return owner.index >= 0 and index is not None and index < accelerator.device_count()


def _hindrance(owner: Owner, index: Any, empty: bool) -> str | None:
    """Return why memory on the device `index` cannot be opened with the owner current; None if it can."""
    if owner.index < 0:
        return "It is not copied to the host silently: copy it in the sender, or in the receiver with .cpu()."
    if not _sees(owner, index):
        which = "the sender's GPU" if index is None else f"the sender's cuda:{index}"
        seen = ", ".join(f"cuda:{i}" for i in range(accelerator.device_count()))
        return f"This process does not see {which} (it sees {seen}; see CUDA_VISIBLE_DEVICES). {_UUIDS}"
    if empty:
        return None
    if not accelerator.can_access_peer(owner.index, index):
        return f"{owner.tag} has no peer access to cuda:{index}, so opening it takes a context there."
    return None


def _copies() -> bool:
    """Tell whether memory on another GPU is to be copied; ``remap()`` asks for that."""
    mode = in_force.mode_of(NAME)
    return mode == "copy" or (mode in ("repair", "uuid") and in_force.is_requested(""))


def _index(sent: int | str) -> int | None:
    """Return this process's index of what a sender wrote: an index, or the UUID of a GPU."""
    if not isinstance(sent, str):
        return sent
    index = _indices.get(sent)
    if index is None:
        index = accelerator.index_of(sent)
        if index is not None:
            _indices[sent] = index
    return index


def _visible(sent: int | str) -> int:
    """Return the same; raise `DeviceResolutionError` for a GPU that this process does not see."""
    index = _index(sent)
    if index is None:
        raise DeviceResolutionError(
            f"ipc: a tensor or event arrived that is on the GPU {sent}, which this process does not see "
            f"({accelerator.device_count()} devices are visible; see CUDA_VISIBLE_DEVICES)."
        )
    return index


def _patch_event(reductions: Any, name: str) -> None:
    original = _patches.find(reductions, name)
    parameters = Parameters(original, "device", "handle")

    def rebuild_event(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        args = parameters.positional(args, kwargs)
        sent = parameters.value(args, "device")
        if not isinstance(sent, str):
            if owner is None or getattr(sent, "type", None) != "cuda" or sent.index in (None, owner.index):
                return original(*args)
            sent = sent.index
        index = _index(sent) if owner is not None and owner.index >= 0 else sent
        if owner is not None and index != owner.index:
            reason = _hindrance(owner, index, False)
            advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
            source = f"cuda:{index}" if isinstance(index, int) else f"GPU {sent}"
            target = owner.tag if reason is None else None
            if judge(NAME, source, owner, 0, advice, target=target, note=reason):
                return original(*parameters.changed(args, "device", owner.device))
        device = accelerator.torch_module().device("cuda", _visible(sent))
        return original(*parameters.changed(args, "device", device))

    _patches.replace(reductions, name, rebuild_event)


def _patch_sending(typed_storage: Any, reductions: Any) -> None:
    original = _patches.find(typed_storage, "_share_cuda_")
    reduce = vars(reductions).get(_KEPT_REDUCE) or _patches.find(reductions, "reduce_tensor")
    reducing = getattr(inspect.unwrap(reduce), "__code__", None)

    def _share_cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = original(self, *args, **kwargs)
        # for messages only, and not beneath SGLang's patch, which puts the UUID in itself
        message = sys._getframe(1).f_code is reducing and _KEPT_REDUCE not in vars(reductions)
        if message and in_force.mode_of(NAME) == "uuid":
            return (accelerator.uuid_of(shared[0]), *shared[1:])
        return shared

    _patches.replace(typed_storage, "_share_cuda_", _share_cuda_)


def _patch_sending_events(kind: type, reductions: Any) -> None:
    original = _patches.find(reductions, "reduce_event")

    def reduce_event(event: Any) -> Any:
        rebuild, args = original(event)
        if in_force.mode_of(NAME) == "uuid":
            parameters = Parameters(rebuild, "device", "handle")
            args = parameters.changed(args, "device", accelerator.uuid_of(event.device.index))
        return rebuild, args

    _patches.replace(reductions, "reduce_event", reduce_event)  # SGLang's patch registers it anew
    _patches.replace(ForkingPickler._extra_reducers, kind, reduce_event)  # type: ignore[attr-defined]
