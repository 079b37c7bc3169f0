"""What a ``map_location`` asks for: a device by its name, or the device of the tag; for the doors ``load`` and ``jit``.

A device that the program names is obeyed. A dictionary without the tag, a function that returns None, and a function
that hands the tag on to torch name none: then the tag is judged as in a load without ``map_location``. A ``"cuda"`` is
the device that the program made current; on a thread that has selected none, it is the owner's.

A function receives the storage in host memory. Its method ``to``, by which torch moves storages, is watched for the
time of the call, so that the move is judged before it happens. A storage that the function makes in another way is
judged by its device, after the fact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from devguard.ownership.owner import Owner, names_cuda
from devguard.reporting.advice import OR_REPAIR, advise
from devguard.reporting.verdict import judge, obey
from devguard.support import accelerator

__all__ = ["ADVICE", "is_away", "leaves_tag", "NAME", "obey_result", "place", "Restore", "restorer_by_request"]

NAME = "load"
ADVICE = f"{advise(NAME)} {OR_REPAIR}"
_BARE = "A 'cuda' without an index means device 0 on a thread that has selected none. Name the device with its index."

Restore = Callable[[Any, str], Any]


def is_away(tag: str, owner: Owner) -> bool:
    """Return whether `tag` names a CUDA device that is not the owner's."""
    if not names_cuda(tag) or tag == owner.tag:
        return False
    if tag == "cuda" and owner.index >= 0:  # torch takes the current device
        return accelerator.current_device_after_init() != owner.index
    return True


def leaves_tag(map_location: Any, tag: str) -> bool:
    """Return whether a `map_location` that is no function leaves a storage where its tag says."""
    if isinstance(map_location, dict):
        default = _fresh(tag)
        return map_location.get(tag, default) is default
    return map_location is None


def place(door: str, tag: str, owner: Owner, nbytes: int) -> str:
    """Judge a device that the program names for a load; return the device to use.

    Raises
    ------
    StrayDeviceError
        In mode ``error``, if `tag` is not the owner's device.
    """
    if not is_away(tag, owner):
        return tag
    if tag == "cuda" and owner.index >= 0:
        current = f"cuda:{accelerator.current_device()}"
        if accelerator.device_0_is_unchosen():
            return owner.tag if judge(door, current, owner, nbytes, _BARE, owner.tag) else tag
        obey(door, current, owner, nbytes)
    else:
        obey(door, tag, owner, nbytes)
    return tag


def restorer_by_request(
    original: Callable[[Any], Restore], map_location: Any, owner: Owner, by_tag: Restore
) -> Restore:
    """Return the function that restores the storages of a load with a ``map_location``.

    Parameters
    ----------
    original : callable
        torch's function, which returns its own restoring function for a ``map_location``.
    map_location : object
        What the program passed; not None.
    owner : Owner
        The owner in force.
    by_tag : callable
        Restores a storage by its tag, judged.
    """
    if isinstance(map_location, dict):
        return _by_table(original, map_location, owner, by_tag)
    restore = original(map_location)
    if map_location is original(None):
        return by_tag
    if isinstance(map_location, (str, bytes)) or not callable(map_location) or hasattr(map_location, "index"):
        tag = map_location.decode() if isinstance(map_location, bytes) else str(map_location)

        def restore_as_named(storage: Any, location: str) -> Any:
            target = place(NAME, tag, owner, storage.nbytes())
            return restore(storage, location) if target is tag else by_tag(storage, target)

        return restore_as_named if names_cuda(tag) and tag != owner.tag else restore
    return _by_function(map_location, owner, by_tag)


def _by_table(original: Callable[[Any], Restore], table: dict[str, Any], owner: Owner, by_tag: Restore) -> Restore:
    restore_as_tagged = original(None)

    def restore_by_table(storage: Any, location: str) -> Any:
        default = _fresh(location)
        target = table.get(location, default)  # as torch does: a subclass may have its own `get`
        if target is default:
            return by_tag(storage, location)
        if isinstance(target, str):
            target = place(NAME, target, owner, storage.nbytes())
        return restore_as_tagged(storage, target)

    return restore_by_table


def _by_function(function: Callable[[Any, str], Any], owner: Owner, by_tag: Restore) -> Restore:
    def restore_by_function(storage: Any, location: str) -> Any:
        tag, judged = _fresh(location), set[str]()

        def to(*, device: Any, non_blocking: bool = False) -> Any:
            """Move the storage, after a judgement of the device."""
            target = _named_to_torch(sys._getframe(1)) or str(device)
            del storage.to  # what follows may move the storage as well
            try:
                if target is tag:
                    judged.add(str(device))
                    return by_tag(storage, location)
                if names_cuda(target):
                    judged.update((target, str(device)))
                    device = place(NAME, target, owner, storage.nbytes())
                return storage.to(device=device, non_blocking=non_blocking)
            finally:
                storage.to = to

        storage.to = to
        try:
            result = function(storage, tag)
        finally:
            vars(storage).pop("to", None)
        if result is None:
            return by_tag(storage, location)
        return obey_result(result, owner, judged)

    return restore_by_function


def obey_result(result: Any, owner: Owner, judged: set[str] | frozenset[str] = frozenset()) -> Any:
    """Return a storage that the program's own code made; judge its device, unless that was done before the storage."""
    tag = str(getattr(result, "device", "cpu"))
    if tag not in judged and "cuda" not in judged and is_away(tag, owner):
        obey(NAME, tag, owner, result.nbytes())
    return result


def _fresh(tag: str) -> str:
    """Return an equal string that is another object, by which to recognise a tag that is passed on."""
    return tag.encode().decode()


def _named_to_torch(frame: FrameType) -> str | None:
    """Return the tag with which ``default_restore_location`` was called; None in a frame of other code."""
    if frame.f_globals is vars(sys.modules["torch.serialization"]):
        tag = frame.f_locals.get("location")
        return tag if isinstance(tag, str) else None
    return None
