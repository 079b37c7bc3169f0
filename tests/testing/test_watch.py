"""Watching one test on the CPU: strays, scopes, patches and an installed owner; planted/ covers devices."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import devguard
from devguard.ownership.stack import local
from devguard.testing.watch import Watch
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))  # tagged cuda:3


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Iterator[Watch]:
    """A watch of this test, as the plugin makes it, with an owner for the whole session."""
    devguard.install("repair", "cpu")
    watch = Watch(request.node, Path(__file__).parent, repairs=True)
    watch.start_call()
    yield watch
    watch.end()


def found(watch: Watch) -> list[tuple[str, str, str]]:
    return [(finding.kind, finding.action, finding.where.partition(":")[0]) for finding in watch.look()]


def test_a_test_that_leaves_nothing_behind_has_no_findings(watch: Watch) -> None:
    with devguard.guard("cpu"):
        assert torch.ones(2).sum() == 2
    assert watch.look() == []


def test_a_stray_is_found_once(watch: Watch) -> None:
    pickle.loads(PAYLOAD)
    assert found(watch) == [("load", "repaired", "test_watch.py")]
    assert found(watch) == []


def test_a_scope_that_was_not_exited_is_found_and_exited(watch: Watch) -> None:
    devguard.guard("cpu").__enter__()
    assert found(watch) == [("scope", "left behind", "test_watch.py")]
    assert not local.stack


def test_a_patch_over_devguard_is_found(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *args, **kwargs: original(*args, **kwargs))
    (finding,) = watch.look()
    assert (finding.kind, finding.text.split()[0]) == ("patch", "torch.frombuffer")
    monkeypatch.undo()


def test_another_installed_owner_is_found(watch: Watch) -> None:
    devguard.install("warn", "cpu")
    assert found(watch) == [("install", "left behind", "test_watch.py")]
    devguard.uninstall()
    watch.start_call()
    assert found(watch) == []
