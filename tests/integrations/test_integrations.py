"""Arming all integrations, and whether the environment requests devguard."""

from __future__ import annotations

import subprocess
import sys

import pytest

import devguard
from devguard import integrations
from devguard.integrations import sglang, vllm
from tests.helpers.simulated import ROOT

pytestmark = pytest.mark.usefixtures("clean")


def test_an_integration_that_cannot_be_armed_is_skipped_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    armed = []

    def fail() -> None:
        raise LookupError("no such class")

    monkeypatch.setattr(sglang, "arm", fail)
    monkeypatch.setattr(vllm, "arm", lambda: armed.append("vllm"))
    with pytest.warns(RuntimeWarning, match="sglang is off: LookupError: no such class"):
        integrations.arm()
    assert armed == ["vllm"]


def test_arming_imports_no_framework_and_no_torch() -> None:
    code = """
import sys
from devguard import integrations
integrations.arm()
integrations.arm()
print({"torch", "sglang", "vllm"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"DEVGUARD": "repair"}, True),
        ({"SOME_PLUGINS": "other, devguard"}, True),
        ({"SOME_PLUGINS": "devguards"}, False),
        ({"DEVGUARD": "off", "SOME_PLUGINS": "devguard"}, False),
    ],
)
def test_devguard_is_requested_by_its_variable_or_by_the_list_of_plugins(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: bool
) -> None:
    monkeypatch.delenv("SOME_PLUGINS", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert integrations.is_asked_for("SOME_PLUGINS") is expected


def test_each_integration_is_an_attribute_of_the_package() -> None:
    assert devguard.integrations is integrations
    assert {getattr(integrations, name) for name in integrations.NAMES} == {sglang, vllm}
    with pytest.raises(AttributeError, match="no attribute 'ray'"):
        integrations.ray  # noqa: B018
