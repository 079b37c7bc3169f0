"""The values of the plugin's fixtures: live sequences of strays and contexts, and the device that a test owns.

``DEVGUARD_DEVICE`` takes precedence. A worker of pytest-xdist owns the GPU of its number (``gw5`` on four GPUs owns
``cuda:1``). Any other process owns the GPU of the launcher's local rank, else the first GPU, else ``cpu``.
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
from devguard.support.installed_torch import import_torch

__all__ = ["contexts", "Live", "MARK", "owned_device", "owner_of_process", "strays"]

MARK = pytest.StashKey[Mark]()  # the journal's position when a test began


class Live(Sequence[Any]):
    """A read-only sequence that is computed at each use. It equals any sequence with the same items."""

    def __init__(self, read: Callable[[], Sequence[Any]]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self._read()) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self._read()))


def strays(item: pytest.Item) -> Live:
    """Return the strays since `item` began, those to come included."""
    mark = item.stash.setdefault(MARK, journal.mark())

    def read() -> Sequence[Any]:
        table.inspect("when the test read its strays")
        return journal.since(mark)

    return Live(read)


def contexts() -> Live:
    """Return the devices on which this process holds a context."""
    return Live(status.contexts)


def owner_of_process(environ: Mapping[str, str]) -> Owner:
    """Return the owner of a process with this environment. Imports torch to count the devices.

    Raises
    ------
    DeviceResolutionError, ConfigError
        If the environment names a device that is not visible to this process.
    """
    import_torch()
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


def owned_device(marked: Owner | None, environ: Mapping[str, str]) -> Any:
    """Return the ``torch.device`` that a test owns; `marked` is the owner from its marker."""
    torch = import_torch()
    return torch.device((marked or in_force.owner() or owner_of_process(environ)).tag)
