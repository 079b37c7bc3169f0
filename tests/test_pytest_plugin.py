"""The pytest plugin as pytest loads it; tests/testing has the tests of its parts."""

from __future__ import annotations

import os

import pytest

from devguard import pytest_plugin
from devguard.testing.declared import OPTIONS


@pytest.fixture(autouse=True)
def _no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")  # pytester would import hypothesis again each time
    for name in [name for name in os.environ if name.startswith("DEVGUARD")]:
        monkeypatch.delenv(name)


def test_every_option_is_declared_for_the_command_line_and_the_ini_file(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfig("--devguard=warn", "--devguard-doors=load=error")
    assert config.option.devguard_mode == "warn"
    assert config.option.devguard_gpus is None
    for option in OPTIONS:
        assert not config.getini(option.name)


def test_no_option_registers_nothing(pytester: pytest.Pytester) -> None:
    manager = pytester.parseconfigure().pluginmanager
    assert manager.has_plugin("devguard") or manager.has_plugin("devguard.pytest_plugin")
    assert not manager.has_plugin("devguard-guarding")
    assert not manager.has_plugin("devguard-report")


def test_a_mode_registers_the_guard_and_the_report(pytester: pytest.Pytester) -> None:
    manager = pytester.parseconfigure("--devguard=warn").pluginmanager
    assert manager.has_plugin("devguard-guarding")
    assert manager.has_plugin("devguard-report")


def test_an_old_pytest_is_a_usage_error_only_with_an_option(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest, "__version__", "7.4.4")
    pytester.parseconfigure()
    with pytest.raises(pytest.UsageError, match=r"need pytest 8 or newer; this is 7\.4\.4"):
        pytester.parseconfigure("--devguard=warn")


def test_simulated_gpus_cannot_be_requested_after_the_start(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfig()
    config.known_args_namespace.devguard_gpus = config.option.devguard_gpus = 2
    with pytest.raises(pytest.UsageError, match=r"came too late.*-p devguard\.pytest_plugin"):
        pytest_plugin._guard_tests(config)
