"""The options and the marker of the plugin."""

from __future__ import annotations

import subprocess
import sys

import pytest

from devguard.testing.declared import OPTIONS, marker
from tests.helpers.simulated import ROOT


def test_every_option_has_the_prefix_and_a_name_in_the_ini_file() -> None:
    for option in OPTIONS:
        assert option.flag.startswith("--devguard")
        assert option.name.startswith("devguard_")
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)


def test_the_arguments_of_the_marker_are_optional_and_may_be_positional() -> None:
    assert marker() == {"device": None, "mode": None, "allow": ()}
    assert marker("cuda:1", "warn", ["cuda:2"]) == {"device": "cuda:1", "mode": "warn", "allow": ["cuda:2"]}
    with pytest.raises(TypeError, match="devices"):
        marker(devices=1)  # type: ignore[call-arg]


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys, devguard.testing.declared; print({'pytest', 'torch', 'devguard.errors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
