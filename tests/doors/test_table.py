"""The table of doors: per-door modes, and what is valid."""

from __future__ import annotations

import pytest

from devguard import ConfigError, modes
from devguard.doors import table


def test_every_door_lies_in_a_family() -> None:
    assert set(table.DOORS.values()) == {"arrivals", "current_device", "concurrency", "contexts"}
    assert list(table.DOORS) == sorted(table.DOORS)  # the order in which they are opened


def test_doors_are_copied_and_checked() -> None:
    given = {"load": "warn"}
    checked = table.check_doors(given)
    given["load"] = "off"
    assert checked == {"load": "warn"}


def test_an_unknown_door_is_an_error_that_lists_the_doors() -> None:
    with pytest.raises(ConfigError, match=r"no door 'laod'. Doors: artefacts, .*, load, .*, visibility\."):
        table.check_doors({"laod": "warn"})


def test_a_bad_mode_of_a_door_names_the_door() -> None:
    with pytest.raises(ConfigError, match=r"door 'load': 'loud' is not a mode"):
        table.check_doors({"load": "loud"})


def test_a_door_may_have_modes_of_its_own() -> None:
    assert table.check_doors({"ipc": "copy"}) == {"ipc": "copy"}
    with pytest.raises(ConfigError, match=r"door 'load': 'copy' is not a mode. Valid modes: .*, error\."):
        table.check_doors({"load": "copy"})
    with pytest.raises(ConfigError, match=r"door 'ipc': 'move' is not a mode. Valid modes: .*, error, copy, uuid\."):
        table.check_doors({"ipc": "move"})
    with pytest.raises(ConfigError, match="'copy' is not a mode"):
        modes.check_mode("copy")


@pytest.mark.parametrize("doors", ["load", ["load"], 1, {("load", "warn")}])
def test_doors_that_are_no_mapping_are_an_error(doors: object) -> None:
    with pytest.raises(ConfigError, match="map door names to modes"):
        table.check_doors(doors)
