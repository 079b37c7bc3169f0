"""The door ``bookkeeping``: calls that query a device, or wait for one, and may open a context on device 0.

``synchronize``, ``empty_cache``, ``mem_get_info`` and the memory counters mean the current device if they name none. On
a thread that has chosen no device this is device 0, whichever GPU the process owns. They act on the owner instead, if
device 0 is current by default only and holds no context: then no work can be pending there, and opening it is the harm.
A device that the program chose is never replaced, or ``with torch.cuda.device(2): launch(); synchronize()`` would wait
for the wrong one.

Not watched: calls that open nothing, calls that start work on the current device, and ``current_stream``, which
``torch.compile`` recognises by identity. docs/doors.md lists them, and what the calls do for a ``cpu`` owner.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.advice import advise
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.patching import Patches, original_of

__all__ = ["install", "status", "uninstall"]

NAME = "bookkeeping"

# Name of the function -> position of the device among its arguments.
OPENING = {  # These open a context; set_per_process_memory_fraction does so up to torch 2.8.
    "empty_cache": 0,
    "get_memory_info": 0,
    "mem_get_info": 0,
    "set_per_process_memory_fraction": 1,
    "synchronize": 0,
}
COUNTING = {  # These open no context, but act on the wrong device or answer for it.
    "get_per_process_memory_fraction": 0,
    "memory_stats_as_nested_dict": 0,  # called by torch.cuda.memory_stats and most other counters
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
_ADVICE = advise(NAME)


def install() -> None:
    """Replace the functions above in each module of torch that has them; a build without CUDA has none to watch."""
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
    wrappers: dict[Any, Callable[..., Any]] = {}
    for module, names in wanted:
        for name, position in names.items():
            original = original_of(vars(module).get(name))
            if original is None or original in wrappers.values():
                continue  # The module or this torch lacks the function, or it is replaced already.
            if original not in wrappers:
                wrappers[original] = _wrap(original, name, position)
            _patches.replace(module, name, wrappers[original])


def uninstall() -> list[str]:
    """Restore torch's own functions."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the watched functions, and the names that hold copies from before the door opened."""
    watched = sorted(f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced)
    return {"watched": watched, "early_copies": _patches.early_copies()}


def _wrap(original: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
    """Return `original`, with a check of the device if a call names none.

    Some of these functions last two microseconds, of which passing on ``*args, **kwargs`` would be a sixth. So
    functions that take nothing, or only a device, get wrappers with exactly these parameters.
    """
    # Before CUDA is initialised, asking for the current device would initialise it.
    get_device, is_initialized = accelerator.queries()

    def of_the_current_device() -> Any:
        stack = local.stack
        if stack:
            if stack[-1][2] >= 0 and not stack.changes:  # the owner's device, or one that the program chose since
                return original()
        else:
            owner = process.owner
            if owner is None or (owner.index > 0 and is_initialized() and get_device() and not stack.changes):
                return original()
        owner = _find_target(name)
        return original() if owner is None else _run_on_owner(original, name, owner, (), {})

    def of_a_device(device: Any = None) -> Any:
        if device is None:
            stack = local.stack
            if stack:
                if stack[-1][2] >= 0 and not stack.changes:
                    return original(get_device())  # torch takes longer to resolve None
            else:
                owner = process.owner
                if owner is None:
                    return original()
                if owner.index > 0 and not stack.changes and is_initialized():
                    current = get_device()
                    if current:
                        return original(current)
        owner = _find_target(name) if _has_no_device((device,), {}, 0) else None
        return original(device) if owner is None else _run_on_owner(original, name, owner, (device,), {})

    def of_any(*args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        if stack and stack[-1][2] >= 0 and not stack.changes:
            return original(*args, **kwargs)
        owner = _find_target(name) if _has_no_device(args, kwargs, position) else None
        return original(*args, **kwargs) if owner is None else _run_on_owner(original, name, owner, args, kwargs)

    parameters = [(p.name, p.kind, p.default) for p in inspect.signature(original).parameters.values()]
    if not parameters:
        return of_the_current_device
    return of_a_device if parameters == [("device", inspect.Parameter.POSITIONAL_OR_KEYWORD, None)] else of_any


def _find_target(name: str) -> Owner | None:
    """Return the owner on which a call without a device acts; None if the call stays on the current device."""
    owner = in_force.owner_at_door()
    if owner is None or owner.index == 0:
        return None
    if owner.index < 0:
        return owner if _would_open(name) else None
    if _is_idle(name) and not accelerator.is_initialized():
        return None
    return owner if accelerator.device_0_is_unchosen() else None


def _is_idle(name: str) -> bool:
    """Return whether the function does nothing, and initialises nothing, before CUDA is initialised."""
    return name == "empty_cache" or name not in OPENING


def _would_open(name: str) -> bool:
    """Return, for a ``cpu`` owner, whether the function would act on device 0, which is current and has no context."""
    if not accelerator.is_initialized():  # asking for the current device would initialise CUDA
        return not _is_idle(name) and not accelerator.is_in_bad_fork()
    return accelerator.device_0_is_unchosen()


def _has_no_device(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> bool:
    """Return whether a call names no device, or only ``"cuda"``."""
    device = args[position] if len(args) > position else kwargs.get("device")
    if device is None or device.__class__ is int:
        return device is None
    return str(device) == "cuda"


def _run_on_owner(
    original: Callable[..., Any], name: str, owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run on the owner a call that would act on device 0, if the verdict is to repair."""
    if owner.index >= 0:
        if judge(NAME, "cuda:0", owner, 0, _ADVICE, target=owner.tag):
            return _run_on(owner.index, original, args, kwargs)
    elif name in ("empty_cache", "synchronize"):
        if judge(NAME, "cuda:0", owner, 0, _ADVICE, target=owner.tag):
            held = accelerator.contexts()  # empty_cache frees the memory of all devices, whichever device is current
            return _run_on(held[0], original, args, kwargs) if held and name == "empty_cache" else None
    elif name in OPENING:
        judge(NAME, "cuda:0", owner, 0, _ADVICE)
    return original(*args, **kwargs)


def _run_on(index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    exchange = accelerator.bind()
    previous = exchange.to(index)
    try:
        return original(*args, **kwargs)
    finally:
        exchange.back(previous)
