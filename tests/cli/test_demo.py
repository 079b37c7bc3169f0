"""The command ``devguard demo``: help, bad arguments, exit status. tests/demo tests the demonstration itself."""

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
    """Replace the passes by a made-up result that the test may change."""
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


def test_the_command_does_not_import_torch(monkeypatch, staged, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["demo", "--json"]) == 0


def test_the_transport_of_the_guarded_pass_is_handed_on(staged, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_both", lambda *rest: seen.append(rest[-1]) or staged)
    assert cli.main(["demo", "--json"]) == cli.main(["demo", "--json", "--transport", "host"]) == 0
    assert seen == ["pickle", "host"]


def test_help_explains_the_transport(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--transport {pickle,host}" in text
    assert "the peaks of GPU 0, of the host's memory and of /dev/shm" in text


def test_a_clean_result_returns_0(staged, capsys):
    assert cli.main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == staged


def test_a_result_that_is_not_clean_returns_1(staged, capsys):
    staged["guarded"]["stray_contexts"] = 1
    assert cli.main(["demo"]) == 1
    assert "The guarded pass was NOT clean" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("error", [DemoError("rank 1 died"), SimulationError("no compiler")])
def test_a_failed_demonstration_returns_1_and_prints_the_reason(staged, capsys, monkeypatch, error):
    def fail(*rest):
        raise error

    monkeypatch.setattr(launch, "run_both", fail)
    assert cli.main(["demo"]) == 1
    assert f"devguard demo: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "Valid: 2 to 16"),
        (["--image", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--plot", "chart.doc"], "must end in one of .png"),
        (["--backend", "real", "--torch", "2.13.0"], "--torch selects the version for simulated GPUs"),
    ],
)
def test_bad_arguments_return_2_and_print_what_is_valid(capsys, arguments, message):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_parser_refuses_ranks_that_are_not_a_number(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--ranks", "many"])


@pytest.mark.parametrize("module", ["rich.console", "PIL"])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'torch-devguard[demo]'" in capsys.readouterr().err
