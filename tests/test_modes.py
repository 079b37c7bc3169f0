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
def test_an_invalid_mode_is_an_error_that_lists_the_valid_modes(mode: object) -> None:
    with pytest.raises(ConfigError, match="off, observe, warn, repair, error"):
        modes.check_mode(mode)


@pytest.mark.parametrize("value", ["off", "0", "OFF", " off "])
def test_devguard_off_or_0_is_the_kill_switch(value: str) -> None:
    assert modes.is_killed({"DEVGUARD": value})


@pytest.mark.parametrize("value", ["", "repair", "1", "observe", "none"])
def test_other_values_are_not_the_kill_switch(value: str) -> None:
    assert not modes.is_killed({"DEVGUARD": value})
    assert not modes.is_killed({})


def test_the_kill_switch_reads_the_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    assert modes.is_killed()
    monkeypatch.delenv("DEVGUARD")
    assert not modes.is_killed()


def test_importing_modes_imports_neither_torch_nor_doors() -> None:
    program = "import devguard.modes, sys; sys.exit('torch' in sys.modules or 'devguard.doors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
