"""Preparing this process for an owner, once before its first entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import DeviceResolutionError
from devguard.ownership import prepare
from devguard.ownership.owner import CPU, Owner, owned_tags, owner_of_index
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def prepared() -> Iterator[list[Any]]:
    """The owners that were prepared, and the mode that the scope sets for the door ``load``."""
    seen: list[Any] = []

    def look(owner: Owner, mode_of: prepare.ModeOf) -> None:
        assert owner.device is None, "the observers are called before the owner counts as entered"
        seen.append((owner.tag, mode_of("load")))

    prepare.on_prepare.append(look)
    yield seen
    prepare.on_prepare.remove(look)


def test_an_owner_is_prepared_at_its_first_entry_only(cuda: FakeCuda, prepared: list[Any]) -> None:
    for _ in range(2):
        with devguard.guard(1, mode="warn"), devguard.guard("cpu"):
            pass
    assert prepared == [("cuda:1", "warn"), ("cpu", None)]
    assert owned_tags() == ["cpu", "cuda:1"]


def test_a_prepared_owner_has_its_device() -> None:
    prepare.prepare(CPU)
    assert CPU.device == torch.device("cpu")


def test_a_device_that_is_not_there_is_an_error_and_stays_unprepared(cuda: FakeCuda, prepared: list[Any]) -> None:
    owner = owner_of_index(cuda.count)
    with pytest.raises(DeviceResolutionError, match="CUDA_VISIBLE_DEVICES"):
        prepare.prepare(owner)
    assert owner.device is None
    assert prepared == []


def test_an_owner_stays_unprepared_if_a_door_refuses_it() -> None:
    def refuse(owner: Owner, mode_of: prepare.ModeOf) -> None:
        raise LookupError

    prepare.on_prepare.append(refuse)
    try:
        with pytest.raises(LookupError):
            prepare.prepare(CPU)
    finally:
        prepare.on_prepare.remove(refuse)
    assert CPU.device is None


def test_forget_prepares_every_owner_and_every_thread_again(cuda: FakeCuda, prepared: list[Any]) -> None:
    for _ in range(2):
        with devguard.guard(1):
            pass
        prepare.forget()
        assert owned_tags() == []
    assert [tag for tag, _ in prepared] == ["cuda:1", "cuda:1"]
    assert cuda.calls.count(("set", 1)) == 2
