"""``--devguard-gpus N`` restarts the whole run on simulated GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devguard import simgpu
from tests.helpers.simulated import POSSIBLE

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="simulated GPUs exist for Linux on x86-64 only")

# Records each import: the module, the process and the number of GPUs.
RECORDER = """
import os
with open("imports", "a") as file:
    print(__name__, os.getpid(), os.environ.get("DEVGUARD_SIM_GPUS"), file=file)
"""
TESTS = """
import os, sys
def test_one(request):
    assert os.environ["DEVGUARD_SIM_GPUS"] == "3"
    assert request.config.getoption("keyword") == "one or words"
    print("to output"); print("to error", file=sys.stderr)
    os.write(1, b"to descriptor 1")
def test_words(): assert False, "as it is"
def test_other(): assert False
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(RECORDER)
    pytester.makepyfile(helper=RECORDER, test_it=TESTS)
    return pytester


def imports(name: str) -> list[str]:
    """Return the number of GPUs at each import of a module."""
    path = Path("imports")
    return (
        [line.split()[2] for line in path.read_text().splitlines() if line.split()[0] == name] if path.exists() else []
    )


@pytest.mark.parametrize("program", [[sys.executable, "-m", "pytest"], [Path(sys.executable).parent / "pytest"]])
def test_a_restart_keeps_arguments_plugins_capture_and_exit_status(suite: pytest.Pytester, program: list[str]) -> None:
    arguments = ["-p", "helper", "-p", "no:cacheprovider", "-k", "one or words", "-rA", "--devguard-gpus", "3"]
    done = suite.run(*program, *arguments, "test_it.py")
    done.assert_outcomes(passed=1, failed=1, deselected=1)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["devguard: tests are not guarded; 3 simulated GPUs*", "*AssertionError: as it is"])
    done.stdout.fnmatch_lines(["*Captured stdout call*", "to output", "to descriptor 1*", "*stderr*", "to error"])
    assert imports("helper") == ["None", "3"]  # imported before and after the restart
    assert imports("conftest") == ["3"]
    assert len({line.split()[1] for line in Path("imports").read_text().splitlines()}) == 1


def test_a_run_on_that_many_simulated_gpus_is_not_restarted(suite: pytest.Pytester, monkeypatch) -> None:
    for name, value in simgpu.environment(3).items():
        monkeypatch.setenv(name, value)
    assert suite.runpytest_subprocess("-p", "helper", "--devguard-gpus=3", "-k", "one or words").ret == 1
    assert imports("helper") == ["3"]


def test_another_number_of_gpus_replaces_the_enclosing_simulation(suite: pytest.Pytester, monkeypatch) -> None:
    for name, value in simgpu.environment(2).items():
        monkeypatch.setenv(name, value)
    suite.makeini("[pytest]\ndevguard_gpus = 3")
    assert suite.runpytest_subprocess("-p", "helper", "-k", "one or words").ret == 1
    assert imports("helper") == ["2", "3"]


@pytest.mark.parametrize("option", ["--help", "--version", "--markers", "--devguard-gpus=0"])
def test_a_run_without_tests_or_without_gpus_is_not_restarted(suite: pytest.Pytester, option: str) -> None:
    suite.makepyfile(test_it="def test_nothing(): pass")
    done = suite.runpytest_subprocess("-p", "helper", "--devguard-gpus", "3", option)
    assert done.ret == 0
    assert "3" not in imports("helper")


def test_collecting_sees_the_same_gpus_as_the_tests(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it="import os\nassert os.environ['DEVGUARD_SIM_GPUS'] == '3'\ndef test_nothing(): pass")
    done = suite.runpytest_subprocess("--devguard-gpus", "3", "--devguard=error", "--collect-only", "-q")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["test_it.py::test_nothing"])


def test_a_simulation_that_cannot_be_built_is_a_usage_error(suite: pytest.Pytester, monkeypatch) -> None:
    monkeypatch.setenv("DEVGUARD_CACHE_DIR", "/dev/null/nowhere")
    done = suite.runpytest_subprocess("--devguard-gpus", "3")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: --devguard-gpus 3: */dev/null belongs to root*Set DEVGUARD_CACHE_DIR to*"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["-c", "import pytest; print(pytest.main(['--devguard-gpus', '3']))"],
            "*inside another program*devguard sim*",
        ),
        (["-E", "-m", "pytest", "--devguard-gpus", "3"], "*needs PYTHONPATH, which this Python ignores*"),
    ],
)
def test_a_process_that_cannot_be_restarted_is_a_usage_error(
    suite: pytest.Pytester, command: list[str], message: str
) -> None:
    done = suite.run(sys.executable, *command)
    assert imports("conftest") == []
    done.stderr.fnmatch_lines([f"ERROR: --devguard-gpus 3 {message}"])


def test_a_plugin_that_is_loaded_too_late_is_a_usage_error(suite: pytest.Pytester) -> None:
    suite.makeconftest("pytest_plugins = ['devguard.pytest_plugin']")
    suite.makeini("[pytest]\ndevguard_gpus = 3")
    done = suite.runpytest_subprocess("--disable-plugin-autoload", "-p", "no:cacheprovider")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*came too late*-p devguard.pytest_plugin*"])
