"""Readers and budgets: what is not valid is refused with what is."""

from __future__ import annotations

from typing import Any

import pytest

from devguard.errors import ConfigError
from devguard.transport import Arena
from devguard.transport.arguments import check_readers, parse_budget

READERS: list[Any] = [0, -1, True, 1.0, "tp0", b"tp0", [], [""], ["a", "a"], ["a", 1], None, ["x" * 101]]
BUDGETS: list[Any] = [0, 65535, -1, True, 1.5e9, "", "1 PB", "lots", None, 1 << 62]


@pytest.mark.parametrize("to", READERS)
def test_readers_that_are_not_valid_are_refused(to: Any) -> None:
    with pytest.raises(ConfigError, match=r"to="):
        check_readers(to)


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_that_are_not_valid_are_refused(budget: Any) -> None:
    with pytest.raises(ConfigError, match="1GiB"):
        Arena("cpu", budget=budget)


def test_valid_ones() -> None:
    assert check_readers(3) == 3
    assert check_readers(["tp0", "tp1"]) == ("tp0", "tp1")
    assert parse_budget("1GiB") == 1 << 30
    assert parse_budget(100_000) == 98_304  # whole pages


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="'cpu'"):
        Arena("cuda:0", budget="1GiB")
