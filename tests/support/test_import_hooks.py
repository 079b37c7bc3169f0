"""Patches of modules that are imported later."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from devguard.support import import_hooks


@pytest.fixture
def name(tmp_path, monkeypatch, request) -> Iterator[str]:
    """A module that is not imported yet; one for each test, because hooks stay registered."""
    name = f"devguard_late_{request.node.name}"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_an_imported_module_is_patched_at_once(name):
    module = __import__(name)
    seen: list[ModuleType] = []
    import_hooks.when_imported(name, seen.append)
    import_hooks.when_imported(name, seen.append)
    assert seen == [module, module]


def test_a_module_imported_later_is_patched_once(name):
    seen: list[ModuleType] = []
    patch = seen.append
    import_hooks.when_imported(name, patch)
    import_hooks.when_imported(name, patch)
    assert seen == []
    assert name not in sys.modules
    module = __import__(name)
    assert seen == [module]


def test_two_patches_of_one_module_both_run(name):
    seen: list[str] = []
    import_hooks.when_imported(name, lambda module: seen.append("first"))
    import_hooks.when_imported(name, lambda module: seen.append("second"))
    __import__(name)
    assert sorted(seen) == ["first", "second"]
