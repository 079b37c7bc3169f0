"""A torch that does not load devguard; tests/process/test_guard_that_is_off.py shows what a program sees."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from devguard.ownership import unloaded
from tests.helpers.simulated import ROOT


def test_the_module_imports_neither_torch_nor_wrapt() -> None:
    program = "import sys, devguard.ownership.unloaded; print([n for n in ('torch', 'wrapt') if n in sys.modules])"
    environ = {"PYTHONPATH": str(ROOT), "DEVGUARD": "repair", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_first_import_of_torch_is_reported_and_every_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    monkeypatch.setattr(unloaded, "report", lambda: reports.append("now"))
    unloaded.watch()  # torch is imported
    assert reports == ["now"]
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    monkeypatch.delitem(sys.modules, "torch")
    before = sys.meta_path.copy()
    unloaded.watch()
    assert importlib.util.find_spec("json") is not None
    assert reports == ["now"]
    assert importlib.util.find_spec("torch") is not None
    assert reports == ["now", "now"]
    assert sys.meta_path == before
