"""What every scope shares: `bind`, and the refusal of `async with`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import devguard
from devguard.guards.base import Bound
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def test_async_with_is_a_type_error_that_names_run() -> None:
    async def main(scoped: Any) -> None:
        async with scoped:
            pass

    for scoped in (devguard.guard("cpu"), devguard.remap("cpu"), devguard.unguarded()):
        coroutine = main(scoped)
        with pytest.raises(TypeError, match=r"run\(awaitable\)"):
            coroutine.send(None)


def module_level(value: int) -> tuple[int, str]:
    return value, str(devguard.owner())


class Worker:
    def method(self, value: int) -> tuple[int, str]:
        return module_level(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Worker)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("function", [module_level, Worker().method], ids=["function", "method"])
def test_bind_makes_a_picklable_callable(function: Any) -> None:
    bound = devguard.guard("cpu").bind(function)
    assert isinstance(bound, Bound)
    for each in (bound, pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert each(7) == (7, "cpu")
    assert devguard.owner() is None


def test_bind_takes_the_device_from_the_argument(cuda: FakeCuda) -> None:
    def work(gpu_id: int) -> int:
        return cuda.current

    bound = devguard.guard(argument="gpu_id").bind(work)
    assert bound(2) == 2
    assert bound(gpu_id=3) == 3


def test_the_representation_of_bind_names_the_scope_and_the_function() -> None:
    assert repr(devguard.guard("cpu").bind(module_level)) == "devguard.guard('cpu').bind(module_level)"
