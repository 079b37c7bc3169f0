"""The plugin without GPUs: its imports when unused, its options, and its modes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.simulated import ROOT

ARGUMENTS = ("-p", "no:cacheprovider", "-p", "no:xdist")

TAGGED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pickle, pytest, torch, devguard
from tests.helpers import tagging
BYTES = tagging.dumps(torch.arange(4.0))  # its tag is cuda:3
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """``run(*arguments)`` runs pytest on the files of `pytester`, with no GPU visible."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda *arguments: pytester.runpytest_subprocess(*ARGUMENTS, *arguments)


def test_a_run_without_the_options_imports_nothing_heavy(pytester: pytest.Pytester, run) -> None:
    pytester.makepyfile(
        """
        import sys
        def test_imports():
            assert "devguard.pytest_plugin" in sys.modules
            assert not {"torch", "wrapt", "numpy"} & set(sys.modules)
            ours = {name for name in sys.modules if name.partition(".")[0] == "devguard"}
            plugin = {"devguard.pytest_plugin", "devguard.testing", "devguard.testing.declared"}
            assert ours == {"devguard", "devguard._version", *plugin}
        """
    )
    done = run()
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("devguard:*")


def test_the_plugin_imports_nothing_but_pytest_and_the_standard_library() -> None:
    program = """if True:
        import argparse, inspect, pytest, sys
        before = set(sys.modules)
        import devguard.pytest_plugin
        print(sorted(set(sys.modules) - before))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    plugin = ["devguard.pytest_plugin", "devguard.testing", "devguard.testing.declared"]
    assert done.stdout.strip() == str(["devguard", "devguard._version", *plugin])


def test_pytest_does_not_warn_when_devguard_is_imported_first(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    program = "import devguard, pytest, sys; sys.exit(pytest.main(['-W', 'error', '-p', 'no:cacheprovider']))"
    assert pytester.run(sys.executable, "-c", program).ret == 0


def test_the_marker_is_documented_from_its_signature(pytester: pytest.Pytester) -> None:
    pytester.runpytest_inprocess("--markers").stdout.fnmatch_lines(
        ["@pytest.mark.devguard(device=None, mode=None, allow=()): Guard this test*"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devguard=eror"], "'eror' is not a mode. Valid modes: off, observe, warn, repair, error."),
        (["-o", "devguard_mode=eror"], "devguard_mode in *: 'eror' is not a mode. Valid modes: off, observe,*"),
        (
            ["--devguard=warn", "--devguard-doors=lod=warn"],
            "--devguard-doors: there is no door 'lod'. Doors: artefacts,*",
        ),
        (["--devguard=warn", "--devguard-doors=load"], "--devguard-doors='load' cannot be read. Valid: door=mode,*"),
        (["--devguard-doors=load=warn"], "--devguard-doors needs --devguard=MODE*"),
        (["--devguard-gpus=four"], "'four' is not a valid number of simulated GPUs: give a number from 1 to 16*"),
        (["--devguard-gpus=17"], "'17' is not a valid number of simulated GPUs: give a number from 1 to 16*"),
    ],
)
def test_a_bad_value_is_a_usage_error_that_lists_the_valid_ones(
    pytester: pytest.Pytester, arguments: list[str], message: str
) -> None:
    pytester.makeini("[pytest]")
    pytester.makepyfile("def test_nothing(): pass")
    done = pytester.runpytest_inprocess(*ARGUMENTS, *arguments)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{message}"])


def test_without_torch_the_tests_run_and_the_header_says_so(pytester: pytest.Pytester, run) -> None:
    pytester.makeconftest("import sys; sys.modules['torch'] = None")
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.devguard(device=1, mode="observe")
        def test_it_runs(devguard_strays, devguard_contexts):
            assert not devguard_strays
            assert devguard_contexts == []
        """
    )
    done = run("--devguard=error")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["devguard: nothing is guarded in mode error: *needs torch*pip install*"])


def test_collecting_only_guards_nothing_and_imports_no_torch(pytester: pytest.Pytester, run) -> None:
    pytester.makepyfile("import sys\ndef test_nothing(): pass\nassert 'torch' not in sys.modules")
    done = run("--devguard=error", "--collect-only")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["devguard: mode error; nothing runs", "*<Function test_nothing>"])


@pytest.mark.parametrize(
    ("value", "arguments", "output"),
    [
        ("off", ["--devguard=error"], ["devguard: nothing is guarded in mode error: DEVGUARD=off is set"]),
        ("repair", ["-o", "devguard_mode=error"], []),
        ("repair", ["--devguard=off"], []),
    ],
)
def test_devguard_in_the_environment_overrides_the_ini_file(
    pytester: pytest.Pytester, run, monkeypatch: pytest.MonkeyPatch, value: str, arguments: list[str], output: list[str]
) -> None:
    monkeypatch.setenv("DEVGUARD", value)
    pytester.makeini("[pytest]")
    pytester.makepyfile("import sys\ndef test_nothing(): assert 'torch' not in sys.modules")
    done = run(*arguments)
    done.assert_outcomes(passed=1)
    assert [line for line in done.outlines if line.startswith("devguard")] == output


def test_without_a_gpu_tags_are_found_and_each_mode_applies(
    pytester: pytest.Pytester, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVGUARD", "repair")  # The command line overrides it.
    pytester.makeini("[pytest]\ndevguard_doors = threads=off")
    pytester.makepyfile(
        TAGGED
        + """
def load():
    return pickle.loads(BYTES)

def test_refused(): load()

@pytest.mark.devguard(mode="warn")
def test_warned():
    with pytest.warns(devguard.StrayDeviceWarning), pytest.raises(RuntimeError, match="CUDA"):
        load()

@pytest.mark.devguard(mode="repair")
def test_repaired(devguard_strays):
    assert load().device.type == "cpu"
    assert [(stray.door, stray.source, stray.action) for stray in devguard_strays] == [("load", "cuda:3", "repaired")]
    assert devguard_strays == devguard.strays()

@pytest.mark.devguard(mode="observe")
def test_a_guard_in_the_test_overrides_the_marker():
    with devguard.guard("cpu", mode="error"), pytest.raises(devguard.StrayDeviceError):
        load()

def test_strays_of_other_tests_are_not_listed(devguard_strays): assert not devguard_strays

def test_the_owner(gpu_owner): assert gpu_owner == devguard.owner() == torch.device("cpu")

@pytest.mark.devguard(devices=[1])
def test_marked_badly(): pass

@pytest.mark.devguard(mode="eror")
def test_marked_with_no_mode(): pass

@pytest.mark.devguard(device="cuda:1")
def test_marked_with_a_device_that_is_not_there(): pass

@pytest.mark.devguard(allow=["gpu"])
def test_marked_with_something_that_is_no_device(): pass
"""
    )
    done = run("-v", "--tb=short", "--devguard=error")
    done.stdout.fnmatch_lines(
        ["devguard: mode error, threads=off, owner cpu; *only work that names a GPU can be found (simulated ones: *"]
    )
    done.assert_outcomes(passed=5, failed=1, errors=4)
    done.stdout.fnmatch_lines(
        [
            "*_ ERROR at setup of test_marked_badly _*",
            "@pytest.mark.devguard: *got an unexpected keyword argument 'devices'. Valid arguments: device='cuda:1'*",
            "*_ ERROR at setup of test_marked_with_no_mode _*",
            "'eror' is not a mode. Valid modes: off, observe, warn, repair, error.",
            "*_ ERROR at setup of test_marked_with_a_device_that_is_not_there _*",
            "this process cannot own a GPU: *devguard sim*",
            "*_ ERROR at setup of test_marked_with_something_that_is_no_device _*",
            "allow= of the devguard marker is 'gpu'. Valid: a device such as*",
            "*_ test_refused _*",
            "*test_without_a_gpu*.py:8: in load",
            "E   devguard.errors.StrayDeviceError: load: 16 bytes were about to go to cuda:3, but this scope owns cpu*",
            "*= devguard: 4 findings in 4 tests =*",
            "*test_without_a_gpu*.py:8 in load: 4 x, 64 bytes",
            "  load: cuda:3, owner cpu: refused [[]2 x]",
            "  load: cuda:3, owner cpu: warned [[]1 x]",
        ]
    )


def test_a_stray_during_import_is_reported_and_torch_is_restored(
    pytester: pytest.Pytester, run, tmp_path: Path
) -> None:
    found = tmp_path / "found"
    pytester.makeconftest(
        f"""
        import json, torch, pytest
        def functions():
            return [f"{{f.__module__}}.{{f.__code__.co_filename}}" for f in
                    (torch.serialization._get_restore_location, torch.from_dlpack)]
        BEFORE = functions()
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_sessionfinish(session):
            during = functions()
            yield
            open({str(found)!r}, "w").write(json.dumps([BEFORE, during, functions()]))
        """
    )
    pytester.makepyfile(TAGGED + "TENSOR = pickle.loads(BYTES)\ndef test_nothing(): pass")
    pytester.makeini("[pytest]\ndevguard_mode = repair")
    done = run()
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(
        ["*= devguard: 1 finding outside every test =*", "*:6 in <module>: 1 x, 16 bytes", "  outside every test"]
    )
    before, during, after = json.loads(found.read_text())
    assert before == after
    assert before != during


def test_a_stray_outside_the_tests_of_an_xdist_worker_reaches_the_summary(pytester: pytest.Pytester, run) -> None:
    pytester.makepyfile(TAGGED + "TENSOR = pickle.loads(BYTES)\ndef test_nothing(): pass")
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "1", "--devguard=repair")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(
        ["*= devguard: 1 finding outside every test =*", "*:6 in <module>: 1 x, *", "  outside every test"]
    )


def test_a_bad_owner_in_the_environment_is_a_usage_error(
    pytester: pytest.Pytester, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVGUARD_DEVICE", "cuda:7")
    pytester.makeconftest(  # A stand-in for torch that sees no GPU is enough.
        """
        import sys, types
        cuda = types.SimpleNamespace(device_count=lambda: 0)
        sys.modules["torch"] = types.SimpleNamespace(__version__="2.13.0", _C=None, cuda=cuda)
        """
    )
    pytester.makepyfile("def test_nothing(): pass")
    done = run("--devguard=error")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(
        ["*--devguard=error: the owner of these tests names cuda:7, but no CUDA device is visible*"]
    )
