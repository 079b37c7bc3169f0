"""The door ``triton``: Triton launches a kernel on the current device, whichever device holds its arguments.

With tensors on another device the launch fails at best; at worst it reads memory over the bus from an unwanted context.
Before each launch the door compares the devices of the arguments (tensors, Triton's wrappers of tensors, tuples of
these) with the owner. Mode ``repair`` launches on the device of the arguments, if there is only one. Every launch
arrives in ``JITFunction.run``; ``Autotuner.run`` is watched too: tuning allocates and measures on the current device.

Not seen: kernels that ``torch.compile`` launches (it sets the device itself), kernels called through the object that
``warmup`` or a launch returned, and Triton's interpreter. See docs/doors.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "triton"

# Module of Triton -> the class in it that has the watched `run`.
CLASSES = {"triton.runtime.jit": "JITFunction", "triton.runtime.autotuner": "Autotuner"}
_PLAIN = frozenset({int, float, bool, str, type(None)})

_patches = Patches()
_ADVICE_CURRENT = (
    "Triton launches on the current device, and the arguments are on the owner. Launch inside "
    "torch.cuda.device_of(tensor), or use mode='repair'."
)
_ADVICE_FOREIGN = (
    "The arguments are on that device. Move them to the owner, or, if that device is intended, launch inside "
    "devguard.unguarded()."
)
_ADVICE_SEVERAL = (
    "The arguments are on several devices. Move them to one device, or launch inside devguard.unguarded()."
)


class _State:
    """The state of this door.

    Attributes
    ----------
    exchange : Exchange or None
        The functions that move the current device; None while the door is closed.
    missing : list of str
        The methods that the imported Triton lacks.
    """

    def __init__(self) -> None:
        self.exchange: accelerator.Exchange | None = None
        self.missing: list[str] = []


_state = _State()


class _Thread(threading.local):
    busy = False  # whether a launch that has been judged is running: an autotuner launches more


_thread = _Thread()


def install() -> None:
    """Watch Triton's launches, now or when Triton is imported; a build of torch without CUDA has none."""
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    _state.exchange = accelerator.bind()
    _state.missing.clear()
    for name in CLASSES:
        when_imported(name, _patch)


def uninstall() -> list[str]:
    """Restore Triton's own methods."""
    _state.exchange = None
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the watched classes of Triton; none before Triton is imported."""
    row: dict[str, Any] = {"watched": [kind.__qualname__ for kind, _, _, _ in _patches.replaced]}
    if _state.missing:
        row["problem"] = f"not in this Triton: {', '.join(_state.missing)}"
    return row


def _patch(module: ModuleType) -> None:
    """Watch the launches of one class of Triton."""
    exchange = _state.exchange
    if exchange is None:
        return
    kind = vars(module).get(CLASSES[module.__name__])
    if kind is None or "run" not in vars(kind):
        _state.missing.append(f"{module.__name__}.{CLASSES[module.__name__]}.run")
    elif not _patches.has(kind):
        _patches.replace(kind, "run", _wrap(_patches.find(kind, "run"), exchange))


def _wrap(original: Callable[..., Any], exchange: accelerator.Exchange) -> Callable[..., Any]:
    current_device, _ = accelerator.queries()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        owner = stack[-1][1] if stack else process.owner
        if owner is None:
            return original(self, *args, **kwargs)
        found: set[int] = set()
        _collect(args, found)
        _collect(kwargs.values(), found)
        if not found or (len(found) == 1 and owner.index in found and current_device() == owner.index):
            return original(self, *args, **kwargs)
        if _thread.busy:
            return original(self, *args, **kwargs)
        previous = exchange.to(_judge_launch(found))  # torch does nothing for -1
        _thread.busy = True
        try:
            return original(self, *args, **kwargs)
        finally:
            _thread.busy = False
            exchange.back(previous)

    return run


def _collect(values: Iterable[Any], found: set[int]) -> None:
    """Add to `found` the indices of the CUDA devices that hold `values`."""
    for value in values:
        if value.__class__ in _PLAIN:
            continue
        if isinstance(value, tuple):
            _collect(value, found)
            continue
        on_cuda = getattr(value, "is_cuda", None)
        if on_cuda is None:  # A TensorWrapper or a TensorDescriptor has a base, a constexpr has none.
            value = getattr(value, "base", None)
            on_cuda = getattr(value, "is_cuda", False)
        if on_cuda:
            found.add(value.get_device())


def _judge_launch(found: set[int]) -> int:
    """Judge a launch with arguments on the devices `found`; return the device to launch on, -1 for the current one.

    Never called if the owner's device is current and holds all arguments.
    """
    owner = in_force.owner_at_door()  # This look-up may restore the current device, if a library had changed it.
    if owner is None:
        return -1
    current = accelerator.current_device()
    away = ",".join(f"cuda:{index}" for index in sorted(found) if index != owner.index)
    if len(found) > 1:
        judge(NAME, away, owner, 0, _ADVICE_SEVERAL, note=f"arguments on {len(found)} devices, cuda:{current} current")
        return -1
    (index,) = found
    if away:
        judge(NAME, away, owner, 0, _ADVICE_FOREIGN, note=f"the arguments are there, cuda:{current} was current")
        return index if index != current and in_force.mode_of(NAME) == "repair" else -1
    if current != index and judge(NAME, f"cuda:{current}", owner, 0, _ADVICE_CURRENT, target=owner.tag):
        return index
    return -1
