"""The exceptions: their base classes, and that they survive pickling."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import devguard
from devguard import ConfigError, DeviceResolutionError, errors
from tests.helpers.simulated import ROOT


@pytest.mark.parametrize("kind", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_error_survives_pickling_and_is_a_devguard_error(kind: str) -> None:
    error = getattr(errors, kind)("what happened")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.args) == (type(error), error.args)
    assert isinstance(back, devguard.DevGuardError)
    assert isinstance(back, RuntimeError)


def test_a_wrong_value_is_a_value_error() -> None:
    assert issubclass(DeviceResolutionError, ValueError)
    assert issubclass(ConfigError, ValueError)


def test_the_warning_is_a_runtime_warning() -> None:
    assert issubclass(devguard.StrayDeviceWarning, RuntimeWarning)
    assert not issubclass(devguard.StrayDeviceWarning, errors.DevGuardError)


def test_the_errors_need_no_torch() -> None:
    code = "import sys, devguard.errors; print(sorted(name for name in sys.modules if name.startswith('devguard.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "['devguard._version', 'devguard.errors']\n"
