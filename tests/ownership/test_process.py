"""The settings of the process: its owner and modes, and the eras that they begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import devguard
from devguard.ownership import process as process_module
from devguard.ownership.owner import CPU, owned_tags, owner_of_index
from devguard.ownership.process import on_owner, process, unguarded_contexts
from devguard.ownership.stack import local
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")

CHANGES: dict[str, Callable[[], None]] = {
    "own": lambda: process.own(CPU),
    "configure": lambda: process.configure("warn", {}, "install"),
    "renew": process.renew,
    "reset": process.reset,
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_starts_a_new_era(change: str) -> None:
    before = process.era
    CHANGES[change]()
    assert process.era is not before


def test_observers_are_called_with_the_next_owner_before_and_after_the_change() -> None:
    seen: list[Any] = []

    def look(owner: Any) -> None:
        seen.append((owner, process.owner))

    on_owner.append(look)
    try:
        process.own(CPU)
    finally:
        on_owner.remove(look)
    assert seen == [(CPU, None), (CPU, CPU)]


def test_the_mode_of_a_door_overrides_the_mode_of_the_process_and_that_the_default() -> None:
    assert process.mode_of("load") == "repair"
    assert process.mode_of("load", "observe") == "observe"
    process.configure("warn", {"load": "error"}, "install")
    assert (process.mode_of("load", "observe"), process.mode_of("jit", "observe")) == ("error", "warn")


def test_reset_forgets_all_but_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "problem", "DEVGUARD is not valid")
    process.configure("warn", {"load": "error"}, "install")
    process.own(CPU)
    process.restart = lambda: None
    process.reset()
    assert (process.owner, process.mode, process.doors, process.source) == (None, None, {}, "")
    assert (process.adoption, process.restart) == (None, None)
    assert process.problem == "DEVGUARD is not valid"


@pytest.fixture
def forked() -> Iterator[list[str]]:
    """The calls of ``restart``, in a process with a guard and an owner, as a fork leaves it to its child."""
    calls: list[str] = []
    process.own(CPU)
    process.restart = lambda: calls.append("restart")
    scope = devguard.guard("cpu")
    scope.__enter__()
    unguarded_contexts.add(3)
    yield calls
    local.stack.clear()
    unguarded_contexts.discard(3)


def test_disown_forgets_the_parents_owners_and_finds_the_owner_again(forked: list[str]) -> None:
    process_module.disown()
    assert not local.stack
    assert (process.owner, owned_tags(), unguarded_contexts) == (None, [], set())
    assert forked == ["restart"]


def test_owners_of_the_past_are_forgotten_and_those_in_force_stay(cuda: FakeCuda) -> None:
    with devguard.guard(1):
        pass
    devguard.install(device=2)
    with devguard.guard(3):
        assert owned_tags() == ["cuda:1", "cuda:2", "cuda:3"]
        process_module.forget_past_owners()
        assert owned_tags() == ["cuda:2", "cuda:3"]
    assert owner_of_index(1).device is None
