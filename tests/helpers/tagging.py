"""Pickles and files of CPU tensors that carry the tag of a GPU, so that a CPU build of torch can test what a tag does.

A tagger put first into torch's own registry writes the tag; no tensor is on a GPU at any time. On a CPU build torch
refuses to restore such a tag, which is what "the door is closed" looks like in these tests. `landings` lets it restore
one, and notes where each storage would have gone.
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

# What torch says on a CPU build to a tag that nobody repaired.
REFUSAL = "deserialize object on a CUDA device"

# Before devguard's tagger (4.875) and torch's (10 and more); two equal ones would make torch compare functions.
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
    """Inside, whatever is saved or pickled from the CPU carries `tag`."""
    with _registered(
        _TAG_PRIORITY,
        lambda storage: tag if storage.device.type == "cpu" else None,
        lambda storage, location: None,
    ):
        yield


@contextlib.contextmanager
def landings() -> Iterator[list[str]]:
    """Inside, storages with the tag of a GPU are restored (on the CPU), and the list says where each was sent."""
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
    """Return a pickle of `obj` as a process would write it whose CPU tensors were on `tag`."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.dispatch_table = {**copyreg.dispatch_table, **_device_table(tag)}
    with tagged(tag):
        pickler.dump(obj)
    return buffer.getvalue()


def save(obj: Any, tag: str = "cuda:3", *, legacy: bool = False, outer: bool = False) -> bytes:
    """Return the bytes of a ``torch.save`` file of `obj` whose CPU tensors were on `tag`.

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
    """Return a stand-in for the pickle module whose pickler writes `tag` for the device of the CPU."""

    class DevicePickler(pickle.Pickler):
        dispatch_table = {**copyreg.dispatch_table, **_device_table(tag)}  # noqa: RUF012 - read by the C pickler

    return types.SimpleNamespace(__name__="pickle", Pickler=DevicePickler, dump=pickle.dump)


class Nested:
    """Holds another pickle, and unpickles it when it is itself unpickled."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __getstate__(self) -> dict[str, Any]:
        return {"payload": self.payload}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.payload = state["payload"]
        self.value = pickle.loads(self.payload)


class NestedFile:
    """Holds a ``torch.save`` file, and loads it when it is itself unpickled."""

    def __init__(self, payload: bytes, **options: Any) -> None:
        self.state = {"payload": payload, "options": options}

    def __getstate__(self) -> dict[str, Any]:
        return self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.value = torch.load(io.BytesIO(state["payload"]), **state["options"])


class Envelope:
    """An object that no transport looks into: it pickles as the bytes that it carries."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.payload,)


def fresh() -> Iterator[None]:
    """For a fixture: devguard as after import, before the test and after it."""
    devguard.uninstall()
    journal.clear()
    yield
    left_over = list(local.stack)
    local.stack.clear()
    devguard.uninstall()
    journal.clear()
    assert not left_over, f"the test left scopes on its thread: {left_over}"
