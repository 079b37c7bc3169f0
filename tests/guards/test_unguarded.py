"""`unguarded`: nothing is judged inside it, and the guard around it resumes afterwards."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import devguard
from devguard import StrayDeviceError
from tests.helpers import tagging
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


PAYLOAD = tagging.dumps(torch.arange(4.0))


def test_unguarded_without_parentheses_is_a_type_error() -> None:
    with pytest.raises(TypeError):

        @devguard.unguarded
        def work() -> None: ...


def test_loads_inside_unguarded_are_left_alone() -> None:
    with tagging.landings() as seen, devguard.guard("cpu", mode="error"):
        with devguard.unguarded():
            pickle.loads(PAYLOAD)
        with pytest.raises(StrayDeviceError):
            pickle.loads(PAYLOAD)
    assert seen == ["cuda:3"]


def test_unguarded_decorates_too() -> None:
    @devguard.unguarded()
    def work() -> Any:
        return pickle.loads(PAYLOAD)

    with tagging.landings() as seen, devguard.guard("cpu", mode="error"):
        work()
        assert devguard.owner() == torch.device("cpu")
    assert seen == ["cuda:3"]


def test_a_device_moved_inside_unguarded_is_restored_by_the_guard_around_it(cuda: FakeCuda) -> None:
    torch.cuda.set_device(1)
    with devguard.guard(1):
        with devguard.unguarded():
            torch.cuda.set_device(2)
        assert cuda.current == 2
    assert cuda.current == 1
