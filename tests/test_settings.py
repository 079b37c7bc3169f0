"""Modes, door settings and the kill switch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devguard import ConfigError, settings


@pytest.mark.parametrize("mode", ["off", "observe", "warn", "repair", "error"])
def test_the_five_modes_are_valid(mode: str) -> None:
    assert settings.check_mode(mode) == mode
    assert mode in settings.MODES


@pytest.mark.parametrize("mode", ["Repair", "on", "", 1, None, ["repair"]])
def test_another_mode_is_an_error_that_lists_the_valid_ones(mode: object) -> None:
    with pytest.raises(ConfigError, match="off, observe, warn, repair, error"):
        settings.check_mode(mode)


def test_doors_are_copied_and_checked() -> None:
    given = {"load": "warn"}
    checked = settings.check_doors(given, ("load", "jit"))
    given["load"] = "off"
    assert checked == {"load": "warn"}


def test_an_unknown_door_is_an_error_that_lists_the_doors() -> None:
    with pytest.raises(ConfigError, match=r"no door 'laod'. Doors: jit, load"):
        settings.check_doors({"laod": "warn"}, ("load", "jit"))


def test_a_bad_mode_of_a_door_names_the_door() -> None:
    with pytest.raises(ConfigError, match=r"door 'load': 'loud' is not a mode"):
        settings.check_doors({"load": "loud"}, ("load",))


def test_a_door_may_have_modes_of_its_own() -> None:
    extra: dict[str, tuple[settings.DoorMode, ...]] = {"ipc": ("copy",)}
    assert settings.check_doors({"ipc": "copy"}, ("ipc", "load"), extra) == {"ipc": "copy"}
    with pytest.raises(ConfigError, match=r"door 'load': 'copy' is not a mode. Valid modes: .*, error\."):
        settings.check_doors({"load": "copy"}, ("ipc", "load"), extra)
    with pytest.raises(ConfigError, match=r"door 'ipc': 'move' is not a mode. Valid modes: .*, error, copy\."):
        settings.check_doors({"ipc": "move"}, ("ipc", "load"), extra)
    with pytest.raises(ConfigError, match="'copy' is not a mode"):
        settings.check_mode("copy")


@pytest.mark.parametrize("doors", ["load", ["load"], 1, {("load", "warn")}])
def test_doors_that_are_no_mapping_are_an_error(doors: object) -> None:
    with pytest.raises(ConfigError, match="map door names to modes"):
        settings.check_doors(doors, ("load",))


@pytest.mark.parametrize("value", ["off", "0", "OFF", " off "])
def test_devguard_off_kills(value: str) -> None:
    assert settings.killed({"DEVGUARD": value})


@pytest.mark.parametrize("value", ["", "repair", "1", "observe", "none"])
def test_other_values_do_not_kill(value: str) -> None:
    assert not settings.killed({"DEVGUARD": value})
    assert not settings.killed({})


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    assert settings.killed()
    monkeypatch.delenv("DEVGUARD")
    assert not settings.killed()


def test_settings_know_nothing_of_torch() -> None:
    program = "import devguard.settings, sys; sys.exit('torch' in sys.modules or 'devguard.doors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
