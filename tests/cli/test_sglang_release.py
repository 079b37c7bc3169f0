"""What ``devguard doctor`` says of the installed SGLang; tests/cli/test_doctor.py has its bugs."""

from __future__ import annotations

import pytest

from devguard.cli import sglang_release
from devguard.integrations.sglang import transport_conditions


def test_a_supported_release_has_its_bugs_and_another_one_a_note() -> None:
    found, notes = sglang_release.examine("0.5.23")
    assert found is not None
    assert found["known"]
    assert found["bugs"]
    assert notes == []
    found, notes = sglang_release.examine("0.6.0")
    assert found == {"version": "0.6.0", "known": False, "bugs": []}
    assert "0.6.0" in notes[0]
    assert sglang_release.examine(None) == (None, [])


def test_the_transport_is_shown_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport_conditions, "_reads_as_known", lambda: "")
    assert sglang_release.examine_transport("0.5.23", {}) == (None, "")
    transport, problem = sglang_release.examine_transport("0.5.23", {"DEVGUARD_TRANSPORT": "host"})
    assert problem == ""
    sglang_release.show(sglang_release.examine("0.5.23")[0], transport)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["SGLang 0.5.23", f"  transport: {transport}"]
    sglang_release.show(None, None)
    assert capsys.readouterr().out == ""


def test_a_transport_that_is_not_in_force_is_a_problem() -> None:
    transport, problem = sglang_release.examine_transport(None, {"DEVGUARD_TRANSPORT": "host"})
    assert transport is None
    assert "SGLang is not installed" in problem
