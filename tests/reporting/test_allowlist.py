"""The allow-list: devices that this process may use besides its own."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError
from devguard.reporting import allowlist
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


def loads_in(name: str) -> Any:
    """Unpickle the payload in a module called `name`."""
    module = types.ModuleType(name)
    exec("import pickle\ndef run(data):\n    return pickle.loads(data)", vars(module))
    return module.run(PAYLOAD)


def refused(name: str = __name__) -> bool:
    """Return whether a stray to cuda:3 from a module called `name` is refused."""
    with devguard.guard("cpu", mode="error"):
        try:
            loads_in(name)
        except devguard.StrayDeviceError:
            return True
        except RuntimeError as error:  # allowed: the CPU build of torch then fails to restore it
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
def test_a_pattern_allows_the_modules_that_match_it(pattern: Any) -> None:
    devguard.allow("cuda:3", modules=pattern)
    assert not refused("offload.worker")
    assert refused("serving.worker")


def test_patterns_add_up_and_no_pattern_allows_every_module() -> None:
    devguard.allow("cuda:3", modules="a")
    devguard.allow("cuda:3", modules="b")
    assert not refused("a")
    assert not refused("b")
    assert refused("c")
    devguard.allow("cuda:3")
    assert not refused("c")


def test_uninstall_empties_the_allow_list() -> None:
    devguard.allow("cuda:3")
    devguard.uninstall()
    assert refused()


def test_no_device_and_a_bad_device_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"allow\('cuda:1'\)"):
        devguard.allow()
    with pytest.raises(DeviceResolutionError):
        devguard.allow("gpu")


def test_a_device_allowed_inside_scoped_is_allowed_only_there() -> None:
    devguard.allow("cuda:2")
    with allowlist.scoped():
        devguard.allow("cuda:3")
        assert not refused()
    assert refused()
    assert allowlist.is_allowed("cuda:2")
