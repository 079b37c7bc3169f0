"""The texts about a guessed owner; tests/placement/ownership/test_adoption.py has the processes that report them."""

from __future__ import annotations

import pytest

from devguard.ownership import guess_report
from devguard.ownership.owner import CPU, Owner, owner_of_index


@pytest.mark.parametrize(
    ("mode", "doors", "active"),
    [
        (None, {}, []),
        ("off", {}, []),
        ("observe", {"load": "off"}, []),
        ("repair", {"load": "observe"}, ["repair"]),
        ("observe", {"load": "warn", "ipc": "copy"}, ["load=warn", "ipc=copy"]),
    ],
)
def test_the_active_modes_are_those_that_do_more_than_observe(mode, doors, active) -> None:
    assert guess_report.list_active_modes(mode, doors) == active


def test_a_demotion_names_the_guess_its_source_and_the_reason() -> None:
    text = guess_report.describe_demotion(owner_of_index(2), "set_device", "x.py:3 later selected another device")
    assert text.startswith(
        "devguard assumed that this process owns cuda:2 (from set_device), but x.py:3 later selected another device. "
        "It now only observes. Name the owner, for example cuda:2: `devguard run --device cuda:2 -- ...`"
    )


@pytest.mark.parametrize(
    ("owner", "reason", "advised"),
    [
        (None, "it cannot tell which GPU this process owns", 1),
        (CPU, "that this process owns cpu is a guess (from set_device)", 1),
        (owner_of_index(3), "that this process owns cuda:3 is a guess (from set_device)", 3),
    ],
)
def test_a_limit_names_the_modes_the_reason_and_a_device(owner: Owner | None, reason: str, advised: int) -> None:
    text = guess_report.describe_limit(owner, "set_device", ["repair", "load=warn"])
    assert text.startswith(f"devguard only observes in this process, although its mode is repair, load=warn: {reason}")
    assert f"DEVGUARD_DEVICE=cuda:{advised}," in text
