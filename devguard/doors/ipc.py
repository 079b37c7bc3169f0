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
- What cannot be repaired is recorded, with the reason in ``note``, and left to torch. Mode ``error`` raises before
  anything is opened; the producer then keeps the memory, as for any message that nobody reads.
- The owner ``cpu`` gets no silent copy to the host: what arrives is recorded and left to torch.

An index is taken as torch takes it: of this process's own list. Between processes with different lists,
``send_uuids()`` in the sender writes the GPU's UUID instead, in the spelling of SGLang's
``monkey_patch_torch_reductions``; the receiver needs this door, or SGLang's patch. Otherwise the bytes stay torch's.

Not seen here: code that calls ``UntypedStorage._new_shared_cuda`` itself, and CUDA storages, which torch does not
send. An event is always identified by its index.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from devguard import accelerator, scope
from devguard.errors import DeviceResolutionError
from devguard.owners import Owner
from devguard.patching import DoorError, Patches
from devguard.verdict import judge

__all__ = ["install", "send_uuids", "status", "uninstall"]

NAME = "ipc"

_patches = Patches()
_sending_uuids = False
_renamed = False  # whether any memory is, or was, open under another device than its own
_indices: dict[str, int] = {}  # UUID -> index here; the list of a process does not change

# Where SGLang's monkey_patch_torch_reductions (and its copies elsewhere) keep torch's functions.
_KEPT = "_rebuild_cuda_tensor_original"
_KEPT_REDUCE = "_reduce_tensor_original"

_EVENTS = ("rebuild_event", "_rebuild_event")  # torch 2.15 sends the second

_ADVICE = "Share memory of this process's own GPU, send CPU tensors, or let devguard open it there (mode='repair')."
_UUIDS = "If sender and receiver see different lists of devices, call devguard.doors.ipc.send_uuids() in the sender."


class _Parameters:
    """Where the parameters of one of torch's functions are: found by name, whatever their order.

    Raises
    ------
    DoorError
        If one of `names` is not there.
    """

    def __init__(self, function: Callable[..., Any], *names: str) -> None:
        self.signature = inspect.signature(function)
        order = list(self.signature.parameters)
        missing = [name for name in names if name not in order]
        if missing:
            raise DoorError(
                f"{function.__module__}.{function.__qualname__} of torch {sys.modules['torch'].__version__} has no "
                f"parameter {', '.join(missing)}; this version of devguard does not know it."
            )
        self.count = len(order)
        self.at = {name: order.index(name) for name in names}

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return all arguments of a call, in order."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def value(self, args: tuple[Any, ...], name: str) -> Any:
        """Return the argument `name`."""
        return args[self.at[name]]

    def changed(self, args: tuple[Any, ...], name: str, value: Any) -> tuple[Any, ...]:
        """Return the arguments with another value of `name`."""
        at = self.at[name]
        return (*args[:at], value, *args[at + 1 :])


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


def uninstall() -> list[str]:
    """Put torch's functions back, also where another patch keeps ours as the one beneath it."""
    reductions = sys.modules.get("torch.multiprocessing.reductions")
    for row in list(_patches.replaced):
        _, name, original, ours = row
        if name != _KEPT and reductions is not None and vars(reductions).get(_KEPT) is ours:
            setattr(reductions, _KEPT, original)
            _patches.replaced.remove(row)
    send_uuids(False)
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return who holds copies of torch's functions from before, and whether UUIDs are sent."""
    return {"early_copies": _patches.early_copies(), "sends_uuids": _sending_uuids}


def send_uuids(on: bool = True) -> None:
    """Send the UUID of a tensor's GPU in place of its index, from now on and from this whole process.

    For senders and receivers that see different lists of devices (``CUDA_VISIBLE_DEVICES``). Every receiver needs
    devguard's doors open, or SGLang's patch: torch alone raises a ``TypeError`` for a UUID.

    Parameters
    ----------
    on : bool
        False for torch's own format, which is the default.
    """
    global _sending_uuids
    _sending_uuids = on


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
    parameters = _Parameters(original, "tensor_size", "dtype", "storage_device", "storage_handle", "storage_size_bytes")
    at, count = parameters.at["storage_device"], parameters.count
    local, process = scope.local, scope.process

    def rebuild_cuda_tensor(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack  # as scope.owner_in_force does it
        if stack.changes:
            scope.settle(stack)
        owner = stack[-1][1] if stack else process.owner
        if len(args) != count:  # pickle passes all of them by position
            args = parameters.positional(args, kwargs)
        index = args[at]
        if index.__class__ is int:
            if owner is None:
                return original(*args)
            if index == owner.index:
                tensor = original(*args)
                return _cached(tensor, owner) if _renamed and tensor.get_device() != index else tensor
        elif not isinstance(index, str):
            return original(*args)  # nothing that this version of devguard knows
        if owner is None or (owner.index >= 0 and _index(index) == owner.index):
            return original(*parameters.changed(args, "storage_device", _visible(index)))
        return _receive(reductions, original, parameters, args, owner)

    _patches.replace(reductions, name, rebuild_cuda_tensor)


def _receive(reductions: Any, original: Any, parameters: _Parameters, args: tuple[Any, ...], owner: Owner) -> Any:
    """Receive a tensor that is not on the owner."""
    global _renamed
    sent, handle = parameters.value(args, "storage_device"), parameters.value(args, "storage_handle")
    nbytes = parameters.value(args, "storage_size_bytes")
    index = _index(sent) if owner.index >= 0 else sent  # finding a UUID initialises CUDA: not for who owns the host
    empty = handle is None or nbytes == 0
    copies = _copies()
    reason = _hindrance(owner, index, None if empty else _opened_on(reductions, handle), empty)
    visible = owner.index >= 0 and index is not None and index < accelerator.device_count()
    repairable = reason is None or (copies and visible)
    source = f"cuda:{index}" if isinstance(index, int) else f"GPU {sent}"
    known = {"dtype": str(parameters.value(args, "dtype")), "shape": parameters.value(args, "tensor_size")}
    advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
    target = owner.tag if repairable else None
    if not judge(NAME, source, owner, nbytes or 0, advice, target=target, note=reason, **known):
        try:
            return original(*parameters.changed(args, "storage_device", _visible(sent)))
        except RuntimeError as error:
            if visible or owner.index < 0 or scope.mode_of(NAME) == "off":
                raise
            raise DeviceResolutionError(f"ipc: {reason}") from error
    _renamed = True
    tensor = original(*parameters.changed(args, "storage_device", index if reason else owner.index))
    return _copy(tensor, owner) if copies and not empty else tensor


def _cached(tensor: Any, owner: Owner) -> Any:
    """Answer for memory of the owner that this process has open already, under another device's name."""
    reason = f"This process has opened that memory under {tensor.device} and still uses it."
    known = {"dtype": str(tensor.dtype), "shape": tensor.shape, "note": reason}
    target = owner.tag if _copies() else None
    if judge(NAME, str(tensor.device), owner, tensor.nbytes, f"{reason} {_ADVICE}", target=target, **known):
        return _copy(tensor, owner)
    return tensor


def _hindrance(owner: Owner, index: Any, opened_on: int | None, empty: bool) -> str | None:
    """Return why memory on the device `index` cannot be opened with the owner current; None if it can."""
    if owner.index < 0:
        return "It is not copied to the host silently: copy it in the sender, or in the receiver with .cpu()."
    if index is None or index >= accelerator.device_count():
        which = "the sender's GPU" if index is None else f"the sender's cuda:{index}"
        seen = ", ".join(f"cuda:{i}" for i in range(accelerator.device_count()))
        return f"This process does not see {which} (it sees {seen}; see CUDA_VISIBLE_DEVICES). {_UUIDS}"
    if empty:
        return None
    if opened_on is not None and opened_on != owner.index:
        return f"This process has opened that memory under cuda:{opened_on} and still uses it."
    if not accelerator.can_access_peer(owner.index, index):
        return f"{owner.tag} has no peer access to cuda:{index}, so opening it takes a context there."
    return None


def _opened_on(reductions: Any, handle: Any) -> int | None:
    """Return the device under which this process has the allocation of `handle` open; None if it has not.

    torch opens an allocation once, for all of its storages, and remembers it by the handle alone.
    """
    for key in list(reductions.shared_cache):
        if isinstance(key, tuple) and key[0] == handle:
            storage = reductions.storage_from_cache(None, key)
            if storage is not None:
                index: int = storage.device.index
                return index
    return None


def _copies() -> bool:
    """Tell whether memory on another GPU is to be copied; ``remap()`` asks for that."""
    mode = scope.mode_of(NAME)
    return mode == "copy" or (mode == "repair" and scope.asked(""))


def _copy(tensor: Any, owner: Owner) -> Any:
    """Return a copy of `tensor` on the owner, of the same kind."""
    torch = sys.modules["torch"]
    copy = tensor.detach().to(owner.device, copy=True)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


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
            f"ipc: a tensor arrived that lies on the GPU {sent}, which this process does not see "
            f"({accelerator.device_count()} devices are visible; see CUDA_VISIBLE_DEVICES)."
        )
    return index


def _patch_event(reductions: Any, name: str) -> None:
    original = _patches.find(reductions, name)
    parameters = _Parameters(original, "device", "handle")

    def rebuild_event(*args: Any, **kwargs: Any) -> Any:
        owner = scope.owner_in_force()
        if owner is None:
            return original(*args, **kwargs)
        args = parameters.positional(args, kwargs)
        device = parameters.value(args, "device")
        if getattr(device, "type", None) != "cuda" or device.index in (None, owner.index):
            return original(*args)
        reason = _hindrance(owner, device.index, None, False)
        advice = _ADVICE if reason is None else f"{reason} {_ADVICE}"
        target = owner.tag if reason is None else None
        if judge(NAME, str(device), owner, 0, advice, target=target, note=reason):
            args = parameters.changed(args, "device", owner.device)
        return original(*args)

    _patches.replace(reductions, name, rebuild_event)


def _patch_sending(typed_storage: Any, reductions: Any) -> None:
    original = _patches.find(typed_storage, "_share_cuda_")
    reduce = vars(reductions).get(_KEPT_REDUCE) or _patches.find(reductions, "reduce_tensor")
    reducing = getattr(inspect.unwrap(reduce), "__code__", None)

    def _share_cuda_(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = original(self, *args, **kwargs)
        # for messages only, and not beneath SGLang's patch, which puts the UUID in itself
        if _sending_uuids and sys._getframe(1).f_code is reducing and _KEPT_REDUCE not in vars(reductions):
            return (accelerator.uuid_of(shared[0]), *shared[1:])
        return shared

    _patches.replace(typed_storage, "_share_cuda_", _share_cuda_)
