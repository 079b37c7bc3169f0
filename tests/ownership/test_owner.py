"""The owner as a value: the valid names of a device, and the devices that are owned."""

from __future__ import annotations

import fractions
import operator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import devguard
from devguard import DeviceResolutionError
from devguard.ownership.owner import CPU, owned_tags, owner_of_index, parse_owner
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def test_there_is_one_owner_object_for_each_device() -> None:
    assert parse_owner("cuda:1") is parse_owner(1) is parse_owner(torch.device("cuda", 1)) is owner_of_index(1)
    assert parse_owner("cpu") is parse_owner(torch.device("cpu")) is CPU
    assert parse_owner(1) is not parse_owner(2)


@pytest.mark.parametrize(
    ("device", "tag"),
    [
        (0, "cuda:0"),
        (3, "cuda:3"),
        ("cuda:1", "cuda:1"),
        ("1", "cuda:1"),
        (" CUDA:2 ", "cuda:2"),
        ("cpu", "cpu"),
        ("CPU", "cpu"),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.device("cpu"), "cpu"),
        (np.int64(2), "cuda:2"),
        (np.uint8(1), "cuda:1"),
    ],
)
def test_the_valid_forms_of_a_device(device: object, tag: str) -> None:
    assert parse_owner(device).tag == tag


@pytest.mark.parametrize(
    "device",
    [
        True,
        False,
        np.True_,
        -1,
        "-1",
        "cuda",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1.0",
        "mps",
        "meta",
        "gpu1",
        "",
        1.0,
        None,
        fractions.Fraction(1),
        (1,),
        b"cuda:1",
        torch.device("cuda"),
        torch.device("meta"),
    ],
    ids=repr,
)
def test_other_forms_are_refused_with_a_list_of_the_valid_ones(device: object) -> None:
    with pytest.raises(DeviceResolutionError, match="cuda:1"):
        parse_owner(device)


def test_cuda_without_an_index_is_refused_with_a_reason() -> None:
    with pytest.raises(DeviceResolutionError, match="without an index"):
        parse_owner("cuda")


def test_an_error_inside_dunder_index_is_not_hidden() -> None:
    class Broken:
        def __index__(self) -> int:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        operator.index(Broken())
    with pytest.raises(ZeroDivisionError):
        parse_owner(Broken())


def test_owned_lists_each_device_that_was_an_owner() -> None:
    assert owned_tags() == []
    with FakeCuda(4).installed(), devguard.guard(2), devguard.guard("cpu"):
        assert owned_tags() == ["cpu", "cuda:2"]
        assert devguard.status()["owned"] == ["cpu", "cuda:2"]


FEW = settings(max_examples=60)


@FEW
@given(st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none() | st.binary(max_size=4))
def test_any_value_is_an_owner_or_a_resolution_error(device: Any) -> None:
    try:
        owner = parse_owner(device)
    except devguard.DeviceResolutionError as error:
        ok = "Valid" in str(error)
    else:
        ok = owner.tag in ("cpu", f"cuda:{owner.index}") and parse_owner(owner.tag) is owner
    assert ok


@pytest.mark.parametrize(
    "device", [10**18, -(10**18), 10**5000, -(10**5000), "9" * 5000, f"cuda:{'9' * 5000}"], ids=range(6)
)
def test_a_number_that_python_does_not_print_is_a_resolution_error(device: object) -> None:
    with pytest.raises(DeviceResolutionError, match="Valid: a device such as"):
        parse_owner(device)
