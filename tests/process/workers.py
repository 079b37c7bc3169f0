"""Targets for child processes that report their owner and the result of loading a pickle with the tag of a GPU."""

from __future__ import annotations

import pickle
from typing import Any

import devguard


def report(payload: bytes) -> dict[str, Any]:
    """Load `payload` and return the result as plain data."""
    try:
        loaded: Any = pickle.loads(payload).tolist()
    except Exception as error:  # noqa: BLE001 - the result for the parent
        loaded = str(error)
    return {
        "owner": str(devguard.owner()),
        "loaded": loaded,
        "strays": [(stray.source, stray.target, stray.action) for stray in devguard.strays()],
    }


def put(queue: Any, *values: Any) -> None:
    queue.put(values)


@devguard.guard("cpu")
def decorated(queue: Any, payload: bytes) -> None:
    put(queue, report(payload))


@devguard.guard(argument="device")
def decorated_by_argument(queue: Any, payload: bytes, device: Any = None) -> None:
    put(queue, report(payload))


@devguard.guard("cpu", mode="error")
def decorated_to_refuse(queue: Any, payload: bytes) -> None:
    put(queue, report(payload))


def undecorated(queue: Any, payload: bytes) -> None:
    put(queue, report(payload))


class Worker:
    """Decorated methods of every kind; an instance is pickled with its bound methods."""

    def __init__(self, name: str) -> None:
        self.name = name

    @devguard.guard("cpu")
    def method(self, queue: Any, payload: bytes) -> None:
        put(queue, report(payload) | {"name": self.name})

    @devguard.guard(argument="device")
    def method_by_argument(self, queue: Any, payload: bytes, device: Any) -> None:
        put(queue, report(payload) | {"name": self.name})

    @staticmethod
    @devguard.guard("cpu")
    def static(queue: Any, payload: bytes) -> None:
        put(queue, report(payload))

    @devguard.guard("cpu")
    @staticmethod
    def static_outside(queue: Any, payload: bytes) -> None:
        put(queue, report(payload))

    @classmethod
    @devguard.guard("cpu")
    def of_class(cls, queue: Any, payload: bytes) -> None:
        put(queue, report(payload) | {"name": cls.__name__})

    @devguard.guard("cpu")
    @classmethod
    def of_class_outside(cls, queue: Any, payload: bytes) -> None:
        put(queue, report(payload) | {"name": cls.__name__})

    def plain(self, queue: Any, payload: bytes) -> None:
        put(queue, report(payload) | {"name": self.name})


@devguard.guard("cpu")
def for_a_pool(payload: bytes) -> dict[str, Any]:
    return report(payload)


def raises_stray() -> None:
    """Raise the error of mode ``error`` in a child of a pool."""
    from tests.helpers import tagging

    with devguard.guard("cpu", mode="error"):
        import torch

        pickle.loads(tagging.dumps(torch.ones(2)))


def owner_of_child() -> str:
    return str(devguard.owner())
