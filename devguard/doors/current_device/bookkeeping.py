"""The door ``bookkeeping``: calls that ask about a device, or wait for one, and may open a context to do so.

``synchronize``, ``empty_cache``, ``mem_get_info`` and the memory counters, of ``torch.cuda`` and ``torch.accelerator``,
mean the current device where none is named. On a thread that has chosen no device that is device 0, whoever owns the
process: the first three then open a context of some hundred megabytes there, and the counters answer for the wrong
device. They act on the owner instead, if nobody has chosen the current device and it holds no context: then nothing
can be pending on it, and opening it is the harm.

A device that somebody chose is never overruled, or ``with torch.cuda.device(2): launch(); synchronize()`` would wait
for the wrong one. Chosen is every current device but 0, a device that holds a context, and any device inside a guard
in which nobody called ``set_device``. One choice leaves no trace: ``with torch.cuda.device(0)`` on a thread without a
guard, where 0 was current anyway. Name the device in the call there.

A ``cpu`` owner has no device to act on: ``synchronize`` and ``empty_cache`` are left out; a question that opens a
context is let through and recorded.

Not here, because they open nothing (seen one by one, torch 2.6 to 2.15): ``ipc_collect``, ``get_device_properties`` and
its kin, the random number generators. Not here either, because they begin work on the current device:
``caching_allocator_alloc``, ``current_blas_handle``. Nor are ``current_stream`` and ``default_stream``, which
``torch.compile`` knows by identity: the first of all such calls in a process asks the current device for the range of
its priorities, which opens it. On a thread that no door has placed that is device 0; the door ``native`` finds it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "bookkeeping"

# name -> where the device stands among the arguments
OPENING = {  # these open a context; the fraction up to torch 2.8
    "empty_cache": 0,
    "get_memory_info": 0,
    "mem_get_info": 0,
    "set_per_process_memory_fraction": 1,
    "synchronize": 0,
}
COUNTING = {  # these open none, and act or answer for the wrong device
    "get_per_process_memory_fraction": 0,
    "memory_stats_as_nested_dict": 0,  # torch.cuda.memory_stats and most others come down to it
    "memory_summary": 0,
    "reset_accumulated_memory_stats": 0,
    "reset_peak_memory_stats": 0,
}
COUNTING_ACCELERATOR = {
    "memory_stats": 0,
    "reset_accumulated_memory_stats": 0,
    "reset_peak_memory_stats": 0,
}

_patches = Patches()
_ADVICE = (
    "This thread has chosen no device, and device 0 holds no context yet. Name the device in the call, or run it "
    "inside devguard.guard(...)."
)


def install() -> None:
    """Replace the functions above in every module of torch that offers them; a build without CUDA has none to watch."""
    import torch

    if not hasattr(torch._C, "_cuda_hasPrimaryContext"):
        return
    for name in ("empty_cache", "mem_get_info", "synchronize"):
        _patches.find(torch.cuda, name)
    wanted: list[tuple[Any, dict[str, int]]] = [
        (module, OPENING | COUNTING) for module in (torch.cuda, torch.cuda.memory)
    ]
    if hasattr(torch, "accelerator"):
        both = (torch.accelerator, getattr(torch.accelerator, "memory", torch.accelerator))
        wanted += [(module, OPENING | COUNTING_ACCELERATOR) for module in both]
    ours: dict[Any, Callable[..., Any]] = {}
    for module, names in wanted:
        for name, position in names.items():
            original = vars(module).get(name)
            if original is None or original in ours.values():
                continue  # not in this module or this torch, or replaced already
            if original not in ours:
                ours[original] = _watched(original, name, position)
            _patches.replace(module, name, ours[original])


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is watched, and who holds copies from before."""
    watched = sorted(f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced)
    return {"watched": watched, "early_copies": _patches.early_copies()}


def _watched(original: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
    """Return `original` with an eye on the device that a call without a device means.

    Some of them last two microseconds, of which passing on ``*args, **kwargs`` would be a sixth; so those that take
    nothing, or only a device, are called as what they are.
    """
    get_device = sys.modules["torch"]._C._cuda_getDevice
    is_initialized = sys.modules["torch"].cuda.is_initialized  # before that, asking for the device would do it

    def of_the_current_device() -> Any:
        stack = local.stack
        if stack:
            if not stack.moved and stack[-1][2] >= 0:  # the owner's, or that of an explicit `with` inside
                return original()
        else:
            owner = process.owner
            if owner is None or (owner.index > 0 and is_initialized() and get_device() and not stack.changes):
                return original()
        owner = _owner_instead(name)
        return original() if owner is None else _elsewhere(original, name, owner, (), {})

    def of_a_device(device: Any = None) -> Any:
        if device is None:
            stack = local.stack
            if stack:
                if not stack.moved and stack[-1][2] >= 0:
                    return original(get_device())  # what None means; torch takes longer to find it
            else:
                owner = process.owner
                if owner is None:
                    return original()
                if owner.index > 0 and not stack.changes and is_initialized():
                    current = get_device()
                    if current:
                        return original(current)
        owner = _owner_instead(name) if _unnamed((device,), {}, 0) else None
        return original(device) if owner is None else _elsewhere(original, name, owner, (device,), {})

    def of_any(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        if stack and not stack.moved and stack[-1][2] >= 0:
            return original(*args, **kwargs)
        owner = _owner_instead(name) if _unnamed(args, kwargs, position) else None
        return original(*args, **kwargs) if owner is None else _elsewhere(original, name, owner, args, kwargs)

    parameters = [(p.name, p.kind, p.default) for p in inspect.signature(original).parameters.values()]
    if not parameters:
        return of_the_current_device
    return of_a_device if parameters == [("device", inspect.Parameter.POSITIONAL_OR_KEYWORD, None)] else of_any


def _owner_instead(name: str) -> Owner | None:
    """Return the owner that a call without a device is to act on; None if nobody owns, or somebody chose the device."""
    owner = in_force.owner_at_door()
    if owner is None or owner.index == 0:
        return None
    torch: Any = sys.modules["torch"]
    try:
        if owner.index < 0:
            return owner if _is_closed(name) else None
        if _is_idle(name) and not torch.cuda.is_initialized():
            return None
        return None if torch._C._cuda_getDevice() or torch._C._cuda_hasPrimaryContext(0) else owner
    except RuntimeError:  # a forked child, which cannot ask; the call itself says what is wrong
        return None


def _is_idle(name: str) -> bool:
    """Tell whether the function does nothing, and initialises nothing, before CUDA is initialised."""
    return name == "empty_cache" or name not in OPENING


def _is_closed(name: str) -> bool:
    """Tell, for a ``cpu`` owner, whether device 0 is current and holds no context, and the function would act on it."""
    torch: Any = sys.modules["torch"]
    if not torch.cuda.is_initialized():  # not asked further: that would initialise CUDA
        return not _is_idle(name) and not torch.cuda._is_in_bad_fork()
    return bool(torch._C._cuda_getDevice() == 0 and not torch._C._cuda_hasPrimaryContext(0))


def _unnamed(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> bool:
    """Tell whether a call leaves the device open: by naming none, or a bare ``"cuda"``."""
    device = args[position] if len(args) > position else kwargs.get("device")
    if device is None or device.__class__ is int:
        return device is None
    return str(device) == "cuda"


def _elsewhere(
    original: Callable[..., Any], name: str, owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Do on the owner what would be done on device 0, if the mode says so."""
    if owner.index >= 0:
        if judge(NAME, "cuda:0", owner, 0, _ADVICE, target=owner.tag):
            return _on(owner.index, original, args, kwargs)
    elif name in ("empty_cache", "synchronize"):
        if judge(NAME, "cuda:0", owner, 0, _ADVICE, target=owner.tag):
            held = accelerator.contexts()  # empty_cache frees the memory of all devices, whichever is current
            return _on(held[0], original, args, kwargs) if held and name == "empty_cache" else None
    elif name in OPENING:
        judge(NAME, "cuda:0", owner, 0, _ADVICE)
    return original(*args, **kwargs)


def _on(index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    exchange = accelerator.bind()
    previous = exchange.to(index)
    try:
        return original(*args, **kwargs)
    finally:
        exchange.back(previous)
