"""Reading the marker of a test: the nearest marker decides each argument."""

from __future__ import annotations

import types
from typing import Any

import pytest

from devguard import ConfigError, DeviceResolutionError
from devguard.testing import markers
from devguard.testing.markers import Marked


def read(*arguments: dict[str, Any]) -> Marked:
    """Read a test with these markers, the nearest first, as pytest lists them."""
    marks = [pytest.mark.devguard(**keywords).mark for keywords in arguments]
    item: Any = types.SimpleNamespace(iter_markers=lambda name: iter(marks))
    return markers.read(item)


def test_without_arguments_nothing_is_set() -> None:
    assert read() == read({}) == Marked(None, None, ())


def test_the_nearest_marker_decides_each_argument() -> None:
    found = read({"device": "cuda:1", "allow": ["cuda:4"]}, {"device": 2, "mode": "warn", "allow": ["cuda:3"]})
    assert found.device is not None
    assert (found.device.tag, found.mode, found.allow) == ("cuda:1", "warn", ("cuda:4",))


def test_a_single_device_is_allowed_without_a_list() -> None:
    assert read({"allow": "cuda:3"}).allow == ("cuda:3",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"devices": 1}, ConfigError, "'devices'. Valid arguments: device='cuda:1'"),
        ({"mode": "loud"}, ConfigError, "'loud' is not a mode"),
        ({"device": "gpu"}, DeviceResolutionError, "the device of the devguard marker is 'gpu'"),
        ({"allow": ["gpu"]}, DeviceResolutionError, "allow= of the devguard marker is 'gpu'"),
    ],
)
def test_a_bad_argument_is_an_error(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(arguments)
