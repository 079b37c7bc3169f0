"""Reading in this process: connections are kept, and a copy lands where the owner is."""

from __future__ import annotations

import pytest
import torch

import devguard
from devguard.errors import ConfigError
from devguard.transport import Arena, join, reading
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def test_a_process_connects_to_an_arena_once(arena: Arena) -> None:
    for number in range(5):
        assert arena.put(number, to=1).get() == number
    assert len(arena.usage().readers) == 1
    assert join(arena.address) is join(arena.address)
    join(arena.address).close()


@pytest.mark.parametrize("name", ["", "x" * 101, 1, b"tp0"])
def test_a_name_that_is_not_valid_is_refused(arena: Arena, name: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        join(arena.address, name)


def test_tensors_of_an_accelerator_go_to_the_owner_and_others_stay(cuda: FakeCuda) -> None:
    place = reading._find_device
    with devguard.guard(3):
        assert (place(True), place(False)) == ("cuda:3", None)
    with devguard.guard("cpu"):
        assert (place(True), place(False)) == (None, None)


def test_a_device_is_for_all_tensors(arena: Arena) -> None:
    value = arena.put({"a": torch.ones(100_000), "b": [torch.zeros(3)]}).get(device="meta")
    assert (value["a"].device.type, value["b"][0].device.type) == ("meta", "meta")
    assert value["a"].shape == (100_000,)


def test_inside_remap_and_a_default_device_nothing_else_happens(arena: Arena, cuda: FakeCuda) -> None:
    with devguard.remap(1), torch.device("meta"):
        value = arena.put(torch.zeros(100_000, device="cpu")).get()
    assert value.device.type == "cpu"
    assert devguard.strays() == ()
