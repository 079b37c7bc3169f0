"""The device that the tests of a process own."""

from __future__ import annotations

import pytest

from devguard import DeviceResolutionError
from devguard.support import accelerator
from devguard.testing import fixtures


@pytest.mark.parametrize(
    ("gpus", "environ", "owner"),
    [
        (4, {}, "cuda:0"),
        (0, {}, "cpu"),
        (4, {"PYTEST_XDIST_WORKER": "gw3", "PYTEST_XDIST_WORKER_COUNT": "8"}, "cuda:3"),
        (4, {"PYTEST_XDIST_WORKER": "gw5", "PYTEST_XDIST_WORKER_COUNT": "8"}, "cuda:1"),
        (1, {"PYTEST_XDIST_WORKER": "gw5"}, "cuda:0"),
        (0, {"PYTEST_XDIST_WORKER": "gw5"}, "cpu"),
        (4, {"PYTEST_XDIST_WORKER": "gw5", "LOCAL_RANK": "2"}, "cuda:1"),
        (4, {"PYTEST_XDIST_WORKER": "gw5", "DEVGUARD_DEVICE": "cuda:3"}, "cuda:3"),
        (4, {"LOCAL_RANK": "2"}, "cuda:2"),
        (4, {"DEVGUARD_DEVICE": "cpu"}, "cpu"),
    ],
)
def test_the_owner_comes_from_the_environment_or_the_worker(
    monkeypatch: pytest.MonkeyPatch, gpus: int, environ: dict[str, str], owner: str
) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: gpus)
    assert fixtures.owner_of_process(environ).tag == owner


@pytest.mark.parametrize("environ", [{"DEVGUARD_DEVICE": "cuda:4"}, {"LOCAL_RANK": "4"}])
def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 4)
    with pytest.raises(DeviceResolutionError, match="cuda:4"):
        fixtures.owner_of_process(environ)
