"""The door ``streams``: a stream or an event that is made for a device that is not the owner's.

A stream belongs to the device named, else to the current device, on which making it opens a context. An event gets its
device when it is first recorded. The record names the line that makes the object; mode ``error`` refuses before it
exists. If no device is named, and device 0 is current by default only (the rule of the door ``bookkeeping``), mode
``repair`` makes a stream, or records an event, on the owner. A device that the program named or chose is not changed.

Not judged: objects that wrap an existing stream, as ``torch.cuda.current_stream()`` does; the events that torch makes
for a stream's own methods; events in a process that owns ``cpu``. ``torch.Stream`` and ``torch.Event`` are C types and
cannot be watched. See docs/doors.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.advice import advise
from devguard.reporting.verdict import judge, obey
from devguard.support import accelerator
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "streams"

_patches = Patches()
_ADVICE = advise(NAME)


def install() -> None:
    """Replace the constructors and ``Event.record``; a build without CUDA makes no streams."""
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    for kind, wrap in (
        (torch.cuda.Stream, _wrap_stream),
        (torch.cuda.ExternalStream, _wrap_external_stream),
        (torch.cuda.Event, _wrap_event),
    ):
        original = _patches.find(kind, "__new__")
        _patches.replace(kind, "__new__", wrap(getattr(original, "__func__", original)))
    _patches.replace(torch.cuda.Event, "record", _wrap_record(_patches.find(torch.cuda.Event, "record")))


def uninstall() -> list[str]:
    """Restore torch's own constructors and ``Event.record``."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return the watched classes."""
    classes = dict.fromkeys(f"torch.cuda.{kind.__name__}" for kind, _, _, _ in _patches.replaced)
    return {"watched": list(classes)}


def _wrap_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(
        cls: Any,
        device: Any = None,
        priority: Any = 0,
        *,
        stream_id: Any = None,
        device_index: Any = None,
        device_type: Any = None,
        **kwargs: Any,
    ) -> Any:
        # torch.cuda.current_stream, which lasts four microseconds, makes its result here: named parameters cost less
        # than copying a dictionary.
        if not kwargs:
            if stream_id is not None and device_index is not None and device_type is not None:
                return original(
                    cls, device, priority, stream_id=stream_id, device_index=device_index, device_type=device_type
                )
            if stream_id is None and device_index is None and device_type is None:
                index = _place(device)
                return original(cls, device if index is None else index, priority)
        given = {"stream_id": stream_id, "device_index": device_index, "device_type": device_type}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        # A stream with an identity exists already; a stream with a pointer is an ExternalStream, judged already.
        if "stream_id" not in kwargs and "stream_ptr" not in kwargs:
            index = _place(device)
            device = device if index is None else index
        return original(cls, device, priority, **kwargs)

    return __new__


def _wrap_external_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        index = _place(args[1] if len(args) > 1 else kwargs.get("device"))
        if index is not None:
            args, kwargs = args[:1], {**kwargs, "device": index}
        return original(cls, *args, **kwargs)

    return __new__


def _wrap_event(original: Callable[..., Any]) -> Callable[..., Any]:
    torch: Any = sys.modules["torch"]
    get_device, is_initialized = accelerator.queries()
    internal = torch.cuda.streams.__name__

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        owner = stack[-1][1] if stack else process.owner
        used = owner is not None and owner.index >= 0 and is_initialized()  # making an event does not initialise CUDA
        away = used and get_device() != owner.index  # type: ignore[union-attr]  # `used` implies an owner
        # The events of Stream.record_event and similar methods go to the device of their stream at once.
        if away and not accelerator.device_0_is_unchosen() and sys._getframe(1).f_globals.get("__name__") != internal:
            _place(None)
        return original(cls, *args, **kwargs)

    return __new__


def _wrap_record(original: Callable[..., Any]) -> Callable[..., Any]:

    def record(self: Any, stream: Any = None) -> None:
        stack = local.stack
        # As in the door bookkeeping: in a guard that took a device, no check is needed.
        needless = stream is not None or (stack and stack[-1][2] >= 0 and not stack.changes)
        owner = None if needless else stack[-1][1] if stack else process.owner
        if owner is not None and owner.index > 0 and accelerator.device_0_is_unchosen():
            index = _place(None)
            if index is not None:
                exchange = accelerator.bind()
                previous = exchange.to(index)  # the first use of any stream opens the current device
                try:
                    original(self)
                finally:
                    exchange.back(previous)
                return
        original(self, stream)

    return record


def _place(device: Any) -> int | None:
    """Judge a stream or event for `device`; return the index of the device to make it on, None to change nothing.

    A `device` of None means the current device.
    """
    owner = in_force.owner_at_door()
    if owner is None:
        return None
    index = -1
    if device is not None and str(device) != "cuda":
        try:
            index = accelerator.index_named(device)
        except (RuntimeError, TypeError, ValueError):
            return None  # torch itself raises the error for such an argument.
    if index >= 0:
        if index != owner.index:
            obey(NAME, f"cuda:{index}", owner)
        return None
    # For a cpu owner, asking for the current device would initialise CUDA.
    index = 0 if owner.index < 0 and not accelerator.is_initialized() else accelerator.current_device()
    if index == owner.index:
        return None
    target = owner.tag if owner.index >= 0 and accelerator.device_0_is_unchosen() else None
    return owner.index if judge(NAME, f"cuda:{index}", owner, 0, _ADVICE, target=target) else None
