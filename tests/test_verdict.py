"""What is allowed is no stray."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError
from tests import tagging

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield from tagging.fresh()


def loads_in(name: str) -> Any:
    """Unpickle the payload in a module called `name`."""
    module = types.ModuleType(name)
    exec("import pickle\ndef run(data):\n    return pickle.loads(data)", vars(module))
    return module.run(PAYLOAD)


def refused(name: str = __name__) -> bool:
    """Whether a stray to cuda:3 from a module of that name is refused."""
    with devguard.guard("cpu", mode="error"):
        try:
            loads_in(name)
        except devguard.StrayDeviceError:
            return True
        except RuntimeError as error:  # allowed: torch's CPU build says that it has no CUDA
            assert "CUDA" in str(error)  # noqa: PT017 - one of two outcomes
            return False
    raise AssertionError("the CPU build restored a CUDA tensor")


def test_an_allowed_device_is_left_alone_and_not_recorded() -> None:
    assert refused()
    count = len(devguard.strays())
    devguard.allow("cuda:3")
    assert not refused()
    assert len(devguard.strays()) == count


def test_another_device_stays_a_stray() -> None:
    devguard.allow("cuda:2", 4)
    assert refused()


@pytest.mark.parametrize("pattern", ["offload", "offload.*", ["other", "off*"]])
def test_by_module_pattern(pattern: Any) -> None:
    devguard.allow("cuda:3", modules=pattern)
    assert not refused("offload.worker")
    assert refused("serving.worker")


def test_patterns_add_up_and_no_pattern_means_all() -> None:
    devguard.allow("cuda:3", modules="a")
    devguard.allow("cuda:3", modules="b")
    assert not refused("a")
    assert not refused("b")
    assert refused("c")
    devguard.allow("cuda:3")
    assert not refused("c")


def test_uninstall_forgets() -> None:
    devguard.allow("cuda:3")
    devguard.uninstall()
    assert refused()


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"allow\('cuda:1'\)"):
        devguard.allow()
    with pytest.raises(DeviceResolutionError):
        devguard.allow("gpu")
