"""The values of the plugin's fixtures: live sequences of strays and contexts, and the device that a test owns.

Each worker of pytest-xdist owns one GPU: worker ``gw5`` on four GPUs owns ``cuda:1``. Elsewhere the device is that of
``DEVGUARD_DEVICE`` or of the launcher's local rank, else the first GPU, else ``cpu``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from devguard.activation import status
from devguard.doors import table
from devguard.ownership import in_force
from devguard.ownership.owner import CPU, Owner, owner_of_index
from devguard.ownership.resolve import owner_from_environment
from devguard.reporting.journal import Mark, journal
from devguard.support import accelerator

__all__ = ["contexts", "device_of", "Live", "MARK", "of_process", "strays"]

MARK = pytest.StashKey[Mark]()  # where the journal stood when a test began


class Live(Sequence[Any]):
    """A read-only sequence whose items are asked for at each use. It equals any sequence with the same items."""

    def __init__(self, ask: Callable[[], Sequence[Any]]) -> None:
        self._ask = ask

    def __getitem__(self, index: Any) -> Any:
        return self._ask()[index]

    def __len__(self) -> int:
        return len(self._ask())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self._ask()) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self._ask()))


def strays(item: pytest.Item) -> Live:
    """Return what strayed since `item` began."""
    mark = item.stash.setdefault(MARK, journal.mark())

    def ask() -> Sequence[Any]:
        table.inspect("when the test asked for its strays")
        return journal.since(mark)

    return Live(ask)


def contexts() -> Live:
    """Return the devices on which this process holds a context."""
    return Live(status.contexts)


def of_process(environ: Mapping[str, str]) -> Owner:
    """Return the owner of a process with this environment; imports torch, to count its devices.

    Raises
    ------
    DeviceResolutionError, ConfigError
        If what names a device names none that this process sees.
    """
    accelerator.torch_module()
    count = accelerator.device_count()
    worker = re.fullmatch(r"gw(\d+)", environ.get("PYTEST_XDIST_WORKER", ""))
    if worker and count and not environ.get("DEVGUARD_DEVICE", "").strip():
        return owner_of_index(int(worker[1]) % count)
    named, _ = owner_from_environment(environ)
    if named is None:
        return owner_of_index(0) if count else CPU
    if named.index >= count:
        raise accelerator.out_of_range("the owner of these tests", named.index)
    return named


def device_of(marked: Owner | None, environ: Mapping[str, str]) -> Any:
    """Return the ``torch.device`` that a test owns; `marked` is the owner that its marker names."""
    torch = accelerator.torch_module()
    return torch.device((marked or in_force.owner() or of_process(environ)).tag)
