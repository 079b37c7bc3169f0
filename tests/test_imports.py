"""The cost of importing devguard, and the modules that it must not import."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

import devguard
from tests.helpers.simulated import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    dropped = ("DEVGUARD", "PYTHONPROFILE", "PYTHONDONTWRITEBYTECODE")  # An installed package has its bytecode.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_importing_devguard_imports_its_face_and_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import devguard; print(sorted(set(sys.modules) - before))"
    assert run("-c", program).stdout.strip() == "['__future__', 'devguard', 'devguard._version']"


def test_help_imports_nothing_slow() -> None:
    done = run("-X", "importtime", "-m", "devguard", "--help")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "devguard" in imported
    slow = {"torch", "wrapt", "numpy", "rich", "asyncio", "inspect", "subprocess", "multiprocessing", "logging"}
    assert not imported & slow
    assert "usage: devguard" in done.stdout


def test_building_and_decorating_import_no_torch() -> None:
    program = """
import sys, devguard
scope = devguard.guard("cuda:1", mode="error", doors={"load": "warn"})
@devguard.guard(argument="gpu_id")
def work(gpu_id): ...
@devguard.guard()
async def other(): ...
devguard.remap(); devguard.unguarded(); scope.bind(work)
devguard.strays(); devguard.contexts(); devguard.status(); devguard.owner(); devguard.uninstall()
print(sorted({"torch", "wrapt"} & set(sys.modules)))
"""
    assert run("-c", program).stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    assert dir(devguard) == sorted(devguard.__all__)
    for name in devguard.__all__:
        assert getattr(devguard, name) is not None


def test_the_public_names_are_sorted_and_documented() -> None:
    assert devguard.__all__ == sorted(devguard.__all__, key=str.casefold)
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(document.read_text() for document in documents)
    undocumented = [name for name in devguard.__all__ if not re.search(rf"\b{name}\b", text) and name != "__version__"]
    assert not undocumented, f"describe in README.md or docs/: {', '.join(undocumented)}"


def test_public_names_are_not_shadowed_by_modules_of_the_package() -> None:
    program = """
import devguard.activation.status, devguard.guards.unguarded, devguard.guards.no_strays, devguard.guards.remap, devguard
import types
names = [name for name in devguard.__all__ if isinstance(getattr(devguard, name), types.ModuleType)]
print(names)
"""
    assert run("-c", program).stdout.strip() == "[]"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gaurd'"):
        devguard.gaurd  # noqa: B018


def test_without_torch_entering_a_guard_raises_with_the_package_to_install() -> None:
    program = """
import sys
sys.modules["torch"] = None
import devguard
try:
    with devguard.guard("cpu"): pass
except devguard.DevGuardError as error:
    print(isinstance(error, ImportError), error)
"""
    printed = run("-c", program).stdout
    assert printed.startswith("True ")
    assert "pip install 'torch-devguard[torch]'" in printed


def test_a_torch_that_is_too_old_is_refused_with_its_version() -> None:
    program = """
import sys, types
sys.modules["torch"] = types.SimpleNamespace(__version__="2.5.1+cu124")
import devguard
try:
    with devguard.guard("cpu"): pass
except devguard.DevGuardError as error:
    print(error)
"""
    printed = run("-c", program).stdout
    assert "2.6" in printed
    assert "2.5.1" in printed


# Public names besides those of devguard itself: they stay when modules move.
PUBLIC = {
    "devguard.errors": "BudgetFull ConfigError DevGuardError DeviceResolutionError HandleReleased PeerGone "
    "SimulationError StrayDeviceError StrayDeviceWarning TracingError",
    "devguard.integrations": "arm disarm is_asked_for",
    "devguard.integrations.sglang": "arm Bug BUGS disarm guarded_engine known_bugs NEWEST OLDEST plugin "
    "UnsupportedVersionError worker",
    "devguard.integrations.vllm": "arm disarm plugin",
    "devguard.transport": "Arena BudgetFull Handle HandleReleased join LeaseUsage PeerGone Reader Usage",
    "devguard.simgpu": "active DeviceState environment ProcessState SimulationError state",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_of_the_modules_stay(module: str) -> None:
    found = importlib.import_module(module)
    names = PUBLIC[module].split()
    assert set(names) <= set(found.__all__)
    assert all(getattr(found, name) is not None for name in names)
