"""The door ``streams``: a stream or an event that is made for a device that is not the owner's.

``torch.cuda.Stream`` and ``ExternalStream`` belong to the device named, else to the one that is current when they are
made; making one opens a context there, and work queued on it later runs there, or fails. An ``Event`` gets its device
when it is first recorded: that of the stream it is recorded in, else the current one. It is recorded which line makes
it, and mode ``error`` refuses before it exists.

- No device is named, and the current one is device 0 merely because this thread has chosen none (the rule of the door
  ``bookkeeping``: device 0 holds no context): made on the owner in mode ``repair``; an event is recorded there.
- No device is named, and somebody chose the current one, as ``with torch.cuda.device(2)`` does: left there. An event
  that is made there is mostly recorded there.
- A device is named: never overridden, recorded as kept.

Wrapping a stream that exists already (``torch.cuda.current_stream()``) is no making, and neither are the events that
torch makes for a stream's own methods. Not seen: ``torch.Stream`` and ``torch.Event``, which are types of C and cannot
be watched, and events in a process that owns ``cpu``, which open nothing until they are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import local
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal, refused
from devguard.reporting.verdict import judge
from devguard.support import accelerator
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "streams"

_patches = Patches()
_ADVICE = (
    "Make it inside devguard.guard(...), pass the owner's device, or, if it is meant, make it inside "
    "devguard.unguarded()."
)
_ADVICE_NAMED = (
    "The program names that device itself, which devguard never overrides. Correct it, or allow it with "
    "devguard.unguarded()."
)


def install() -> None:
    """Replace the constructors, and ``Event.record``; a build without CUDA makes no streams."""
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
    _patches.replace(torch.cuda.Event, "record", _watched_record(_patches.find(torch.cuda.Event, "record")))


def uninstall() -> list[str]:
    """Put torch's own constructors back."""
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return which classes are watched."""
    classes = dict.fromkeys(f"torch.cuda.{kind.__name__}" for kind, _, _, _ in _patches.replaced)
    return {"watched": list(classes)}


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
                index = _place(device)
                return original(cls, device if index is None else index, priority)
        given = {"stream_id": stream_id, "device_index": device_index, "device_type": device_type}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        # one with an identity exists already; one with a pointer is an external one, and has been looked at
        if "stream_id" not in kwargs and "stream_ptr" not in kwargs:
            index = _place(device)
            device = device if index is None else index
        return original(cls, device, priority, **kwargs)

    return __new__


def _watched_external_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        index = _place(args[1] if len(args) > 1 else kwargs.get("device"))
        if index is not None:
            args, kwargs = args[:1], {**kwargs, "device": index}
        return original(cls, *args, **kwargs)

    return __new__


def _watched_event(original: Callable[..., Any]) -> Callable[..., Any]:
    torch: Any = sys.modules["torch"]
    get_device, internal = torch._C._cuda_getDevice, torch.cuda.streams.__name__

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        stack = local.stack
        owner = stack[-1][1] if stack else process.owner
        used = owner is not None and owner.index >= 0 and torch.cuda.is_initialized()  # an event by itself does not
        away = used and get_device() != owner.index  # type: ignore[union-attr]  # there is one if it is used
        # not those of Stream.record_event and its like: they go to that stream's device at once
        if away and not _is_unchosen() and sys._getframe(1).f_globals.get("__name__") != internal:
            _place(None)
        return original(cls, *args, **kwargs)

    return __new__


def _watched_record(original: Callable[..., Any]) -> Callable[..., Any]:

    def record(self: Any, stream: Any = None) -> None:
        stack = local.stack
        # as in the door bookkeeping: inside a guard in which nobody moved the device nothing needs a look
        looked = stream is not None or (stack and not stack.moved and stack[-1][2] >= 0)
        owner = None if looked else stack[-1][1] if stack else process.owner
        if owner is not None and owner.index > 0 and _is_unchosen():
            index = _place(None)
            if index is not None:
                exchange = accelerator.bind()
                previous = exchange.to(index)  # the first use of any stream opens the current device by itself
                try:
                    original(self)
                finally:
                    exchange.back(previous)
                return
        original(self, stream)

    return record


def _is_unchosen() -> bool:
    """Tell whether the current device is device 0 and nobody chose it: nothing is there, and nothing can be pending."""
    torch: Any = sys.modules["torch"]
    try:
        return bool(torch._C._cuda_getDevice() == 0 and not torch._C._cuda_hasPrimaryContext(0))
    except RuntimeError:  # a forked child, which cannot ask; the call itself says what is wrong
        return False


def _place(device: Any) -> int | None:
    """Return where to make something for `device` (None: for the current one); None for where it would be anyway."""
    owner = in_force.owner_at_door()
    if owner is None:
        return None
    torch: Any = sys.modules["torch"]
    index = -1
    if device is not None and str(device) != "cuda":
        try:
            index = torch.cuda._utils._get_device_index(device, optional=True)
        except (RuntimeError, TypeError, ValueError):
            return None  # torch says what is wrong with it
    if index >= 0:
        if index != owner.index:
            _obey(f"cuda:{index}", owner)
        return None
    unasked = owner.index < 0 and not torch.cuda.is_initialized()  # asking would initialise CUDA
    index = 0 if unasked else torch._C._cuda_getDevice()
    if index == owner.index:
        return None
    target = owner.tag if owner.index >= 0 and _is_unchosen() else None
    return owner.index if judge(NAME, f"cuda:{index}", owner, 0, _ADVICE, target=target) else None


def _obey(tag: str, owner: Owner) -> None:
    """Record a device that the program names itself; refuse it in mode ``error``."""
    mode = in_force.mode_of(NAME)
    if mode == "off" or is_allowed(tag):
        return
    if mode == "error":
        raise refused(NAME, tag, owner.tag, 0, _ADVICE_NAMED)
    journal.record(NAME, tag, tag, owner.tag, "kept", 0)
