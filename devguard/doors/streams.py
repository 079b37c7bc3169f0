"""The door ``streams``: a stream or an event that is made for a device that is not the owner's.

``torch.cuda.Stream`` and ``ExternalStream`` belong to the device named, else to the one that is current when they are
made; making one opens a context there, and work queued on it later runs there, or fails. An ``Event`` gets its device
when it is first recorded; made while another device is current it is mostly recorded there. Such a one is recorded with
the line that makes it, and refused in mode ``error`` before it exists. It is never moved: the program may count on the
device that it said.

Wrapping a stream that exists already (``torch.cuda.current_stream()``) is no making, and neither are the events that
torch makes for a stream's own methods. Not seen: ``torch.Stream`` and ``torch.Event``, which are types of C and cannot
be watched, and events in a process that owns ``cpu``, which open nothing until they are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from devguard import scope
from devguard.patching import Patches
from devguard.verdict import judge

__all__ = ["install", "status", "uninstall"]

NAME = "streams"

_patches = Patches()
_ADVICE = (
    "Make it inside devguard.guard(...), pass the owner's device, or, if it is meant, make it inside "
    "devguard.unguarded()."
)


def install() -> None:
    """Replace the constructors; a build without CUDA makes no streams."""
    import torch

    if not hasattr(torch._C, "_cuda_getDevice"):
        return
    for kind, watched in (
        (torch.cuda.Stream, _watched_stream),
        (torch.cuda.ExternalStream, _watched_external_stream),
        (torch.cuda.Event, _watched_event),
    ):
        original = _patches.find(kind, "__new__")
        _patches.replace(kind, "__new__", watched(getattr(original, "__func__", original)))


def uninstall() -> list[str]:
    """Put torch's own constructors back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which classes are watched."""
    return {"watched": [f"torch.cuda.{kind.__name__}" for kind, _, _, _ in _patches.replaced]}


def _watched_stream(original: Callable[..., Any]) -> Callable[..., Any]:
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
        # torch.cuda.current_stream makes its answer here, and lasts four microseconds: names cost it less than one
        # dictionary made into another
        if not kwargs:
            if stream_id is not None and device_index is not None and device_type is not None:
                return original(
                    cls, device, priority, stream_id=stream_id, device_index=device_index, device_type=device_type
                )
            if stream_id is None and device_index is None and device_type is None:
                _check_stream(device)
                return original(cls, device, priority)
        given = {"stream_id": stream_id, "device_index": device_index, "device_type": device_type}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        # one with an identity exists already; one with a pointer is an external one, and has been looked at
        if "stream_id" not in kwargs and "stream_ptr" not in kwargs:
            _check_stream(device)
        return original(cls, device, priority, **kwargs)

    return __new__


def _watched_external_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _check_stream(args[1] if len(args) > 1 else kwargs.get("device"))
        return original(cls, *args, **kwargs)

    return __new__


def _watched_event(original: Callable[..., Any]) -> Callable[..., Any]:
    torch: Any = sys.modules["torch"]
    local, process = scope.local, scope.process
    get_device, internal = torch._C._cuda_getDevice, torch.cuda.streams.__name__

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        owner = stack[-1][1] if stack else process.owner
        away = owner is not None and owner.index >= 0 and get_device() != owner.index
        # not those of Stream.record_event and its like: they go to that stream's device at once
        if away and sys._getframe(1).f_globals.get("__name__") != internal:
            _check_stream(None)
        return original(cls, *args, **kwargs)

    return __new__


def _check_stream(device: Any) -> None:
    """Look at the device of what is about to be made: `device`, or the current one for None."""
    owner = scope.owner_in_force()
    if owner is None:
        return
    torch: Any = sys.modules["torch"]
    index = -1
    if device is not None:
        try:
            index = torch.cuda._utils._get_device_index(device, optional=True)
        except (RuntimeError, TypeError, ValueError):
            return  # torch says what is wrong with it
    if index < 0:  # torch takes the current device
        unasked = owner.index < 0 and not torch.cuda.is_initialized()  # asking would initialise CUDA
        index = 0 if unasked else torch._C._cuda_getDevice()
    if index != owner.index:
        judge(NAME, f"cuda:{index}", owner, 0, _ADVICE)
