"""The hook that torch calls at the end of its import; tests/process/test_environment.py runs it in real imports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import devguard
from devguard import autoload, integrations
from devguard.ownership.process import process
from devguard.support import notices

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(autouse=True)
def armed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls of `integrations.arm`, which waits for no framework here."""
    calls: list[str] = []
    monkeypatch.setattr(integrations, "arm", lambda: calls.append("arm"))
    before = process.problem
    yield calls
    process.problem = before


@pytest.fixture
def alerts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the alerts of this process, each of which is shown once."""
    monkeypatch.setattr(notices, "_alerts", {})


def is_open() -> bool:
    return any(row["open"] for row in devguard.status()["doors"].values())


def test_without_devguard_set_it_does_nothing(armed: list[str]) -> None:
    autoload.activate()
    assert not is_open()
    assert armed == []


def test_a_mode_activates_devguard_and_then_arms_the_integrations(
    armed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVGUARD", "repair")
    monkeypatch.setenv("DEVGUARD_DEVICE", "cpu")
    autoload.activate()
    assert devguard.status()["process_owner"] == "cpu"
    assert armed == ["arm"]


def test_off_arms_nothing(armed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVGUARD", "off")
    autoload.activate()
    assert armed == []


def test_an_invalid_value_is_an_alert_and_a_problem_in_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alerts: None
) -> None:
    monkeypatch.setenv("DEVGUARD", "loud")
    autoload.activate()
    assert "devguard is off in this process, although DEVGUARD='loud'" in capsys.readouterr().err
    assert "'loud' is not a mode" in devguard.status()["problem"]
    assert not is_open()


def test_an_error_while_arming_closes_the_doors_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alerts: None
) -> None:
    def fail() -> Any:
        raise LookupError("no such module")

    monkeypatch.setattr(integrations, "arm", fail)
    monkeypatch.setenv("DEVGUARD", "repair")
    autoload.activate()
    assert "LookupError: no such module" in capsys.readouterr().err
    assert not is_open()


def test_a_transport_alone_arms_it_and_opens_no_door(armed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "arm_transport", lambda: armed.append("transport"))
    monkeypatch.setenv("DEVGUARD_TRANSPORT", "host")
    autoload.activate()
    assert armed == ["transport"]
    assert not is_open()


def test_an_unknown_transport_is_an_alert_with_the_valid_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alerts: None
) -> None:
    monkeypatch.setenv("DEVGUARD_TRANSPORT", "cuda")
    autoload.activate()
    printed = capsys.readouterr().err
    assert "although DEVGUARD_TRANSPORT='cuda': ConfigError:" in printed
    assert "'cuda' is not a transport. Valid: host, off, 0." in printed
