"""Activation by environment variables in this process; tests/process/test_environment.py goes through torch's hook."""

from __future__ import annotations

import pytest

import devguard
from devguard import ConfigError, DeviceResolutionError
from devguard.activation.activate import activate
from devguard.doors import table
from devguard.ownership.process import process

pytestmark = pytest.mark.usefixtures("clean")


def any_door_is_open() -> bool:
    return any(row["open"] for row in table.status().values())


@pytest.mark.parametrize("environ", [{}, {"DEVGUARD": "off"}, {"DEVGUARD": "0"}, {"DEVGUARD_DEVICE": "cpu"}])
def test_without_a_mode_nothing_is_activated(environ: dict[str, str]) -> None:
    assert not activate(environ)
    assert not any_door_is_open()


def test_a_mode_opens_the_doors_and_the_named_device_becomes_the_owner() -> None:
    assert activate({"DEVGUARD": "warn", "DEVGUARD_DEVICE": "cpu", "DEVGUARD_DOORS": "load=error"})
    status = devguard.status()
    assert (status["process_owner"], status["mode"], status["said_by"]) == ("cpu", "warn", "environment")
    assert status["doors"]["load"]["mode"] == "error"
    assert any_door_is_open()


@pytest.mark.usefixtures("cuda")
def test_the_owner_is_the_only_visible_gpu_or_the_local_rank() -> None:
    assert activate({"DEVGUARD": "repair", "CUDA_VISIBLE_DEVICES": "3"})
    assert devguard.status()["process_owner"] == "cuda:0"
    devguard.uninstall()
    assert activate({"DEVGUARD": "repair", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"})
    assert devguard.status()["process_owner"] == "cuda:2"


@pytest.mark.usefixtures("cuda")
def test_without_any_device_the_owner_stays_open() -> None:
    assert activate({"DEVGUARD": "repair"})
    assert devguard.status()["process_owner"] is None
    assert process.adoption is not None
    assert process.restart is not None


def test_an_install_of_the_program_stays_in_force() -> None:
    devguard.install("warn", "cpu")
    assert not activate({"DEVGUARD": "error"})
    assert devguard.status()["mode"] == "warn"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"DEVGUARD": "loud"}, ConfigError),
        ({"DEVGUARD": "repair", "DEVGUARD_DEVICE": "cuda:99"}, DeviceResolutionError),
        ({"DEVGUARD": "repair", "DEVGUARD_DEVICE": "cuda:1", "LOCAL_WORLD_SIZE": "4"}, ConfigError),
    ],
)
def test_an_error_leaves_every_door_closed(environ: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        activate(environ)
    assert not any_door_is_open()
    assert devguard.status()["process_owner"] is None
