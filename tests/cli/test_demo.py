"""``devguard demo`` as a command: help, bad arguments, exit status. The scenario itself is tested in tests/demo."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from devguard import cli, simgpu
from devguard.demo import DemoError, launch
from devguard.errors import SimulationError
from tests.demo.results import result
from tests.helpers.simulated import ROOT


@pytest.fixture
def staged(monkeypatch):
    """Replace the passes by a made-up result, which the test may change."""
    found = result(2)
    monkeypatch.setattr(launch, "choose", lambda backend, ranks, torch: launch.Stage("simulated", 2, "a test"))
    monkeypatch.setattr(launch, "run_both", lambda *rest: found)
    monkeypatch.setattr(simgpu, "environment", lambda *rest, **options: {})
    return found


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_help_imports_neither_torch_nor_anything_heavy(command):
    code = f"""
import sys
from devguard.cli import main
try:
    main([{command!r}, "--help"])
except SystemExit as done:
    assert done.code == 0
heavy = {{"PIL", "matplotlib", "numpy", "rich", "torch", "wrapt"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_the_command_itself_imports_no_torch(monkeypatch, staged, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["demo", "--json"]) == 0


def test_a_clean_run_ends_with_0(staged, capsys):
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == staged


def test_a_run_that_is_not_clean_ends_with_1(staged, capsys):
    staged["guarded"]["stray_contexts"] = 1
    assert cli.main(["demo"]) == 1
    assert "did NOT come out clean" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("error", [DemoError("rank 1 died"), SimulationError("no compiler")])
def test_a_run_that_fails_ends_with_1_and_says_why(staged, capsys, monkeypatch, error):
    def fail(*rest):
        raise error

    monkeypatch.setattr(launch, "run_both", fail)
    assert cli.main(["demo"]) == 1
    assert f"devguard demo: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "1"], "valid are 2 to 16"),
        (["--image", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--plot", "chart.doc"], "must end in one of .png"),
        (["--backend", "real", "--torch", "2.13.0"], "--torch chooses the build"),
    ],
)
def test_bad_arguments_end_with_2_and_say_what_is_valid(capsys, arguments, said):
    assert cli.main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_number_that_is_none_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--ranks", "many"])


@pytest.mark.parametrize("module", ["rich.console", "PIL"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'torch-devguard[demo]'" in capsys.readouterr().err
