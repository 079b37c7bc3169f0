"""The mode of torch's own check of contexts; tests/placement/doors/contexts/test_native.py has the check at work."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from devguard.support import context_check
from devguard.support.context_check import VARIABLE


@pytest.fixture
def mode_of_torch(monkeypatch: pytest.MonkeyPatch):
    """torch 2.15's cached reader of the variable."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(context_check, "_was", [])

    @functools.cache
    def read() -> str | None:
        return os.environ.get(VARIABLE)

    monkeypatch.setattr(torch.cuda, "_get_stray_context_mode", read, raising=False)
    read()
    return read


@pytest.mark.parametrize("mode", ["warn", "error"])
def test_the_check_follows_the_mode_and_is_restored(mode_of_torch, mode: str) -> None:
    context_check.follow("warn")
    context_check.follow(mode)
    assert mode_of_torch() == mode
    context_check.restore()
    context_check.restore()
    assert mode_of_torch() is None
    assert VARIABLE not in os.environ


def test_an_empty_variable_is_restored_as_empty(mode_of_torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    context_check.follow("error")
    context_check.restore()
    assert os.environ[VARIABLE] == ""


@pytest.mark.parametrize("mode", ["off", "observe", "repair"])
def test_a_mode_that_neither_warns_nor_raises_leaves_the_check_off(mode_of_torch, mode: str) -> None:
    context_check.follow(mode)
    assert VARIABLE not in os.environ


def test_the_users_own_setting_stays(mode_of_torch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    context_check.follow("error")
    context_check.restore()
    assert os.environ[VARIABLE] == "off"


def test_a_torch_without_the_check_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delattr(torch.cuda, "_get_stray_context_mode", raising=False)
    context_check.follow("error")
    context_check.restore()
    assert VARIABLE not in os.environ
