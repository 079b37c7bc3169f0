"""Importing the installed torch, or an error that says what to install."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import pytest
import torch

from devguard import DevGuardError
from devguard.support.installed_torch import MissingTorchError, import_torch, release


def test_the_installed_torch_is_returned() -> None:
    assert import_torch() is torch


def test_a_missing_torch_is_an_import_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingTorchError, match=r"pip install 'torch-devguard\[torch\]'") as caught:
        import_torch()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, DevGuardError)


@pytest.mark.parametrize("version", ["2.5.1+cu124", "1.13.1", "2.5.0a0+git1234"])
def test_an_old_torch_is_an_error_that_names_its_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    with pytest.raises(MissingTorchError, match=r"torch 2\.6 and newer") as caught:
        import_torch()
    assert version in str(caught.value)


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "2.15.0a0+git1234", "3.0"])
def test_a_supported_version_is_returned(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    stand_in = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert import_torch() is stand_in


def test_a_missing_requirement_of_torch_is_not_reported_as_a_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_requirement(name: str, *args: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'sympy'", name="sympy")
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_requirement)
    with pytest.raises(ModuleNotFoundError, match="sympy") as caught:
        import_torch()
    assert not isinstance(caught.value, DevGuardError)


@pytest.mark.parametrize(
    ("version", "expected"), [("2.13.0+cu130", (2, 13)), ("2.6.0", (2, 6)), ("2.14.0a0+git1234567", (2, 14))]
)
def test_the_release_compares_by_its_numbers(
    version: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert release() == expected
