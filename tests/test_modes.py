"""Modes, door settings and the kill switch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devguard import ConfigError, modes


@pytest.mark.parametrize("mode", ["off", "observe", "warn", "repair", "error"])
def test_the_five_modes_are_valid(mode: str) -> None:
    assert modes.check_mode(mode) == mode
    assert mode in modes.MODES


@pytest.mark.parametrize("mode", ["Repair", "on", "", 1, None, ["repair"]])
def test_another_mode_is_an_error_that_lists_the_valid_ones(mode: object) -> None:
    with pytest.raises(ConfigError, match="off, observe, warn, repair, error"):
        modes.check_mode(mode)


@pytest.mark.parametrize("value", ["off", "0", "OFF", " off "])
def test_devguard_off_kills(value: str) -> None:
    assert modes.killed({"DEVGUARD": value})


@pytest.mark.parametrize("value", ["", "repair", "1", "observe", "none"])
def test_other_values_do_not_kill(value: str) -> None:
    assert not modes.killed({"DEVGUARD": value})
    assert not modes.killed({})


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    assert modes.killed()
    monkeypatch.delenv("DEVGUARD")
    assert not modes.killed()


def test_settings_know_nothing_of_torch() -> None:
    program = "import devguard.modes, sys; sys.exit('torch' in sys.modules or 'devguard.doors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
