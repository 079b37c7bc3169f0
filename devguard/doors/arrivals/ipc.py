"""The door ``ipc``: CUDA tensors and events that another process shares through ``torch.multiprocessing``.

A message carries a handle to memory on one GPU, and the index of this GPU in the sender. torch makes that index current
and opens the handle there. So a tensor from ``cuda:0`` gives each receiver a context on GPU 0, and where the processes
see different lists of GPUs, the index means another GPU. Mode ``repair`` opens the memory with the owner current: the
tensor still shares the sender's memory, and no context is opened elsewhere. What cannot be repaired is left to torch
and recorded, with the reason in ``note``. The modes ``copy`` and ``uuid`` exist only for this door.

Code that opens a handle itself, without ``torch.multiprocessing``, is judged in ipc_storages.py. See docs/doors.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from devguard.doors.arrivals import ipc_memory, ipc_storages
from devguard.doors.arrivals.ipc_memory import find_obstacle, is_visible
from devguard.errors import DeviceResolutionError
from devguard.modes import REPAIRING
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.prepare import on_prepare
from devguard.ownership.process import on_owner, process
from devguard.ownership.stack import changing, look_for_changes
from devguard.reporting.advice import OR_REPAIR, advise
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.installed_torch import import_torch
from devguard.support.patching import DoorError, Parameters, Patches

__all__ = ["install", "status", "uninstall"]

NAME = "ipc"

_patches = Patches()
_receivers = ipc_memory.Receivers()
_indices: dict[str, int] = {}  # UUID -> index in this process; the list of GPUs that a process sees does not change

# The names under which SGLang's monkey_patch_torch_reductions (and its copies elsewhere) keep torch's functions.
_KEPT = "_rebuild_cuda_tensor_original"
_KEPT_REDUCE = "_reduce_tensor_original"

_STORAGE = ("storage_device", "storage_handle", "storage_size_bytes", "storage_offset_bytes")
_EVENTS = ("rebuild_event", "_rebuild_event")  # torch 2.15 sends the second

_ADVICE = f"{advise(NAME)} {OR_REPAIR}"


def install() -> None:
    """Replace the functions by which torch opens handles, and those by which it makes them."""
    import torch
    from torch.multiprocessing import reductions

    ipc_storages.install(_patches, _receivers, _is_copy_requested)
    _patch_received_tensors(reductions)
    present = [name for name in _EVENTS if name in vars(reductions)]
    if not present:
        _patches.find(reductions, _EVENTS[0])  # raises
    for name in present:
        _patch_received_events(reductions, name)
    _patch_sent_tensors(torch.storage.TypedStorage, reductions)
    _patch_sent_events(torch.cuda.Event, reductions)
    on_prepare.append(_add_receiver)
    on_owner.append(_receivers.update)
    _receivers.update(process.owner)


def uninstall() -> list[str]:
    """Put torch's functions back, also where SGLang's patch keeps ours as torch's."""
    reductions = sys.modules.get("torch.multiprocessing.reductions")
    for row in list(_patches.replaced):
        _, name, original, ours = row
        if name != _KEPT and reductions is not None and vars(reductions).get(_KEPT) is ours:
            setattr(reductions, _KEPT, original)
            _patches.replaced.remove(row)
    if _add_receiver in on_prepare:
        on_prepare.remove(_add_receiver)
    if _receivers.update in on_owner:
        on_owner.remove(_receivers.update)
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the copies of torch's functions from before the door opened, and whether this thread sends UUIDs."""
    return {"early_copies": _patches.early_copies(), "sends_uuids": in_force.mode_of(NAME) == "uuid"}


def _add_receiver(owner: Owner, mode_of: Callable[[str], Any]) -> None:
    _receivers.add(owner)


def _patch_received_tensors(reductions: Any) -> None:
    name = "rebuild_cuda_tensor"
    if _patches.find(reductions, name).__module__ != reductions.__name__ and _KEPT in vars(reductions):
        name = _KEPT  # SGLang's patch came first; pickles name its function, which calls this one
    original = _patches.find(reductions, name)
    if original.__module__ != reductions.__name__:
        raise DoorError(
            f"torch.multiprocessing.reductions.{name} was replaced by {original.__module__}.{original.__qualname__}, "
            "which devguard does not recognise. Enter the first guard, or call devguard.install(), before that."
        )
    parameters = Parameters(original, "tensor_size", "dtype", *_STORAGE)
    at, count = parameters.at["storage_device"], parameters.count
    receivers = _receivers

    def rebuild_cuda_tensor(*args: Any, **kwargs: Any) -> Any:
        # Fast path: every owner in this process is this device, or there is no owner.
        if len(args) == count and args[at] == receivers.only and not changing:
            return original(*args)
        owner = in_force.owner_at_door()
        if owner is not None:
            receivers.add(owner)
        if changing:
            look_for_changes()
        if len(args) != count:  # pickle passes all of them by position
            args = parameters.positional(args, kwargs)
        index = args[at]
        if index.__class__ is int:
            if owner is None:
                return original(*args)
        elif not isinstance(index, str):
            return original(*args)  # a kind of index that devguard does not know
        if owner is None or (owner.index >= 0 and _index_of(index) == owner.index and not receivers.several):
            return original(*parameters.changed(args, "storage_device", _visible_index_of(index)))
        if receivers.several and owner.index >= 0:
            with ipc_storages.opening, ipc_storages.already_judged():
                return _receive_tensor(reductions, original, parameters, args, owner)
        with ipc_storages.already_judged():
            return _receive_tensor(reductions, original, parameters, args, owner)

    _patches.replace(reductions, name, rebuild_cuda_tensor)


def _receive_tensor(reductions: Any, original: Any, parameters: Parameters, args: tuple[Any, ...], owner: Owner) -> Any:
    """Receive a tensor that is not on the owner, or may be open on another owner's device."""
    sent, handle = parameters.value(args, "storage_device"), parameters.value(args, "storage_handle")
    nbytes = parameters.value(args, "storage_size_bytes")
    # Looking up a UUID initialises CUDA, which must not happen for the owner cpu.
    index = _index_of(sent) if owner.index >= 0 else sent
    empty = handle is None or nbytes == 0
    opened = None if empty or owner.index < 0 else ipc_storages.opened_on(handle)
    elsewhere = opened is not None and opened != owner.index
    if index == owner.index and not elsewhere:
        return original(*parameters.changed(args, "storage_device", index))
    known = {"dtype": str(parameters.value(args, "dtype")), "shape": parameters.value(args, "tensor_size")}
    source = f"cuda:{opened if elsewhere else index}" if isinstance(index, int) else f"GPU {sent}"
    reason = note = find_obstacle(owner, index, empty)
    copy_requested = _is_copy_requested()
    target = owner.tag if elsewhere or reason is None or (copy_requested and is_visible(owner, index)) else None
    if elsewhere:
        reason = note = f"This process has already opened that memory on {source}."
        if in_force.mode_of(NAME) in REPAIRING:
            note = f"{reason} The owner gets a copy, not an alias."
    advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
    if not judge(NAME, source, owner, nbytes or 0, advice, target=target, note=note, **known):
        try:
            return original(*parameters.changed(args, "storage_device", _visible_index_of(sent)))
        except RuntimeError as error:
            if is_visible(owner, index) or owner.index < 0 or in_force.mode_of(NAME) == "off":
                raise
            raise DeviceResolutionError(f"ipc: {reason}") from error
    if elsewhere:
        key = handle, parameters.value(args, "storage_offset_bytes")
        args = parameters.changed(args, "storage_device", owner.index)
        return ipc_memory.copy_opened_elsewhere(reductions.shared_cache, key, original, args)
    tensor = original(*parameters.changed(args, "storage_device", index if reason else owner.index))
    return ipc_memory.copy(tensor, owner) if copy_requested and not empty else tensor


def _is_copy_requested() -> bool:
    """Return whether to copy memory from another GPU: in mode ``copy``, and inside ``remap()``."""
    mode = in_force.mode_of(NAME)
    return mode == "copy" or (mode in ("repair", "uuid") and in_force.is_requested(""))


def _index_of(sent: int | str) -> int | None:
    """Return the index in this process for the index or UUID that a sender wrote; None for a GPU it does not see."""
    if not isinstance(sent, str):
        return sent
    index = _indices.get(sent)
    if index is None:
        index = accelerator.index_of(sent)
        if index is not None:
            _indices[sent] = index
    return index


def _visible_index_of(sent: int | str) -> int:
    """Return `_index_of`; raise `DeviceResolutionError` for a GPU that this process does not see."""
    index = _index_of(sent)
    if index is None:
        raise DeviceResolutionError(
            f"ipc: received a tensor or an event on the GPU {sent}, which this process does not see "
            f"({accelerator.device_count()} devices are visible; see CUDA_VISIBLE_DEVICES)."
        )
    return index


def _patch_received_events(reductions: Any, name: str) -> None:
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
        index = _index_of(sent) if owner is not None and owner.index >= 0 else sent
        if owner is not None and index != owner.index:
            reason = find_obstacle(owner, index, False)
            advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
            source = f"cuda:{index}" if isinstance(index, int) else f"GPU {sent}"
            target = owner.tag if reason is None else None
            if judge(NAME, source, owner, 0, advice, target=target, note=reason):
                return original(*parameters.changed(args, "device", import_torch().device(owner.tag)))
        device = import_torch().device("cuda", _visible_index_of(sent))
        return original(*parameters.changed(args, "device", device))

    _patches.replace(reductions, name, rebuild_event)


def _patch_sent_tensors(typed_storage: Any, reductions: Any) -> None:
    original = _patches.find(typed_storage, "_share_cuda_")
    reduce = vars(reductions).get(_KEPT_REDUCE) or _patches.find(reductions, "reduce_tensor")
    reducing = getattr(inspect.unwrap(reduce), "__code__", None)

    def _share_cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = original(self, *args, **kwargs)
        # Only in messages, and not beneath SGLang's patch, which writes the UUID itself.
        message = sys._getframe(1).f_code is reducing and _KEPT_REDUCE not in vars(reductions)
        if message and in_force.mode_of(NAME) == "uuid":
            return (accelerator.uuid_of(shared[0]), *shared[1:])
        return shared

    _patches.replace(typed_storage, "_share_cuda_", _share_cuda_)


def _patch_sent_events(kind: type, reductions: Any) -> None:
    original = _patches.find(reductions, "reduce_event")

    def reduce_event(event: Any) -> Any:
        rebuild, args = original(event)
        if in_force.mode_of(NAME) == "uuid":
            parameters = Parameters(rebuild, "device", "handle")
            args = parameters.changed(args, "device", accelerator.uuid_of(event.device.index))
        return rebuild, args

    _patches.replace(reductions, "reduce_event", reduce_event)  # SGLang's patch registers this one again
    _patches.replace(ForkingPickler._extra_reducers, kind, reduce_event)  # type: ignore[attr-defined]
