"""Pickles and files of CPU tensors that carry the tag of a GPU, for tests of tags on a CPU build of torch.

A tagger, put first into torch's own registry, writes the tag; no tensor is ever on a GPU. A CPU build of torch raises
`REFUSAL` for such a tag, so in these tests that error shows that the door is closed. `landings` lets torch restore the
storages, and lists the device that each was meant for.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import types
from collections.abc import Iterator
from typing import Any

import torch

import devguard
from devguard.ownership.stack import local
from devguard.reporting.journal import journal

# torch's error on a CPU build for a tag that was not repaired
REFUSAL = "deserialize object on a CUDA device"

# Lower than devguard's priority (4.875) and torch's (10 and more). torch sorts the rows, so with two equal priorities
# it would compare functions.
_TAG_PRIORITY = 1.5
_LAND_PRIORITY = 2.5


@contextlib.contextmanager
def _registered(priority: float, tagger: Any, deserializer: Any) -> Iterator[None]:
    row = (priority, tagger, deserializer)
    registry = torch.serialization._package_registry
    registry.insert(0, row)
    try:
        yield
    finally:
        registry[:] = [other for other in registry if other is not row]


@contextlib.contextmanager
def tagged(tag: str) -> Iterator[None]:
    """Write `tag` for CPU storages that are saved or pickled inside this block."""
    with _registered(
        _TAG_PRIORITY,
        lambda storage: tag if storage.device.type == "cpu" else None,
        lambda storage, location: None,
    ):
        yield


@contextlib.contextmanager
def landings() -> Iterator[list[str]]:
    """Inside this block, restore storages with a GPU tag on the CPU; yield the list of those tags."""
    landed: list[str] = []

    def restore(storage: Any, location: str) -> Any:
        if not location.startswith("cuda"):
            return None
        landed.append(location)
        return storage

    with _registered(_LAND_PRIORITY, lambda storage: None, restore):
        yield landed


def _device_table(tag: str) -> dict[type, Any]:
    return {torch.device: lambda device: (torch.device, (tag if device.type == "cpu" else str(device),))}


def dumps(obj: Any, tag: str = "cuda:3", protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
    """Return the pickle that a process would write if the CPU tensors in `obj` were on `tag`."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_device_table(tag)}
    with tagged(tag):
        pickler.dump(obj)
    return buffer.getvalue()


def save(obj: Any, tag: str = "cuda:3", *, legacy: bool = False, outer: bool = False) -> bytes:
    """Return the bytes that ``torch.save`` would write if the CPU tensors in `obj` were on `tag`.

    With `outer`, the devices that tensor subclasses remember are changed too.
    """
    buffer = io.BytesIO()
    with tagged(tag):
        if outer:
            torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy, pickle_module=_device_module(tag))
        else:
            torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _device_module(tag: str) -> Any:
    """Return a stand-in for the pickle module; its pickler writes `tag` in place of the device ``cpu``."""

    class DevicePickler(pickle.Pickler):
        dispatch_table = {**copyreg.dispatch_table, **_device_table(tag)}  # noqa: RUF012 - read by the C pickler

    return types.SimpleNamespace(__name__="pickle", Pickler=DevicePickler, dump=pickle.dump)


class Nested:
    """Holds another pickle, and unpickles it while it is being unpickled."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __getstate__(self) -> dict[str, Any]:
        return {"payload": self.payload}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.payload = state["payload"]
        self.value = pickle.loads(self.payload)


class NestedFile:
    """Holds a ``torch.save`` file, and loads it while it is being unpickled."""

    def __init__(self, payload: bytes, **options: Any) -> None:
        self.state = {"payload": payload, "options": options}

    def __getstate__(self) -> dict[str, Any]:
        return self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.value = torch.load(io.BytesIO(state["payload"]), **state["options"])


class Envelope:
    """An object that is pickled as the bytes it carries, so that a transport does not see its tensors."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.payload,)


def fresh() -> Iterator[None]:
    """Reset devguard to its state after import, before and after the test. For fixtures."""
    devguard.uninstall()
    journal.clear()
    yield
    left_over = list(local.stack)
    local.stack.clear()
    devguard.uninstall()
    journal.clear()
    assert not left_over, f"the test left scopes on its thread: {left_over}"
