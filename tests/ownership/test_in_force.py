"""The owner and the mode in force: the innermost scope that sets one wins, then the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import devguard
from devguard.modes import MODES
from devguard.ownership import in_force

pytestmark = pytest.mark.usefixtures("clean")


def mode(door: str = "load") -> str:
    return in_force.mode_of(door)


def test_repair_is_the_default_mode() -> None:
    with devguard.guard("cpu"):
        assert mode() == "repair"


@pytest.mark.parametrize("value", MODES)
def test_the_innermost_scope_overrides_the_outer_one(value: Any) -> None:
    with devguard.guard("cpu", mode="warn"):
        assert mode() == "warn"
        with devguard.guard("cpu", mode=value):
            assert mode() == value
            with devguard.guard("cpu"):
                assert mode() == value
            with devguard.remap("cpu"):
                assert mode() == value
        assert mode() == "warn"


def test_doors_override_the_mode_of_the_same_scope() -> None:
    with devguard.guard("cpu", mode="error", doors={"load": "observe"}):
        assert mode("load") == "observe"
        assert mode("jit") == "error"


def test_an_inner_mode_overrides_an_outer_door() -> None:
    with devguard.guard("cpu", doors={"load": "observe"}):
        assert mode("load") == "observe"
        assert mode("jit") == "repair"
        with devguard.guard("cpu", mode="error"):
            assert mode("load") == "error"
        with devguard.guard("cpu", doors={"jit": "warn"}):
            assert mode("load") == "observe"
            assert mode("jit") == "warn"


def test_a_scope_overrides_install_and_install_overrides_the_default() -> None:
    devguard.install("warn", "cpu", doors={"jit": "observe"})
    assert mode("load") == "warn"
    assert mode("jit") == "observe"
    with devguard.guard("cpu"):
        assert mode("load") == "warn"
        assert mode("jit") == "observe"
    with devguard.guard("cpu", mode="error"):
        assert mode("load") == mode("jit") == "error"


def test_unguarded_overrides_everything_around_it() -> None:
    devguard.install("error", "cpu")
    with devguard.guard("cpu", mode="error"), devguard.unguarded():
        assert mode() == "off"
        assert devguard.owner() is None
        with devguard.guard("cpu", mode="warn"):
            assert mode() == "warn"


def test_a_guard_inside_unguarded_takes_the_mode_of_the_outer_guard() -> None:
    with devguard.guard("cpu", mode="warn"), devguard.unguarded():
        assert mode() == "off"
        with devguard.guard("cpu"):
            assert devguard.owner() == torch.device("cpu")
            assert mode() == "warn"
            with devguard.unguarded():
                assert mode() == "off"
