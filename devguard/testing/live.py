"""Sequences for the fixtures that say what is so now, each time they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from devguard import activation
from devguard import doors as door_table
from devguard.journal import Mark, journal

__all__ = ["Live", "MARK", "contexts", "strays"]

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
        door_table.inspect("when the test asked for its strays")
        return journal.since(mark)

    return Live(ask)


def contexts() -> Live:
    """Return the devices on which this process holds a context."""
    return Live(activation.contexts)
