"""`remap`: a guard that takes the owner of the enclosing guard, and requests the doors that act on request."""

from __future__ import annotations

import pytest

import devguard
from devguard.ownership import in_force
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def test_remap_without_a_device_follows_the_enclosing_guard_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with FakeCuda(4).installed() as cuda:
        with devguard.remap():
            assert cuda.current == 1
        with devguard.guard(3), devguard.remap():
            assert cuda.current == 3


def test_remap_requests_every_door_that_acts_on_request() -> None:
    with devguard.guard("cpu"):
        assert not in_force.is_requested("buffers")
        with devguard.remap():
            assert in_force.is_requested("buffers")
            with devguard.guard("cpu"):
                assert in_force.is_requested("buffers")
            with devguard.unguarded():
                assert not in_force.is_requested("buffers")


def test_remap_is_a_guard_of_another_kind() -> None:
    assert isinstance(devguard.remap("cpu"), devguard.guard)
    assert devguard.remap("cpu") != devguard.guard("cpu")
    assert repr(devguard.remap("cpu", mode="warn")) == "devguard.remap('cpu', mode='warn')"
