"""In a suite with planted strays on four simulated GPUs, exactly the tests that stray fail, and each names the line."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.testing.conftest import PLANTED, Run

ERROR = "--devguard=error"
# test -> file:line of its stray, from the comments "# strays: NAME, ..." in the planted files
LINES = {
    name: f"{file.relative_to(PLANTED)}:{number}"
    for file in PLANTED.rglob("*.py")
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if "# strays: " in line
    for name in line.partition("# strays: ")[2].split(", ")
}
BEHAVING = set(re.findall(r"def (test_\w+)", (PLANTED / "test_behaves.py").read_text()))
FAILS_ANYWAY = "test_it_fails_anyway_and_strays"

in_one_process_and_in_two = pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one", "two"])


@in_one_process_and_in_two
def test_exactly_the_tests_that_stray_fail(planted: Callable[..., Run], processes: tuple[str, ...]) -> None:
    run = planted(ERROR, *processes)
    assert run.returncode == 1
    assert set(run.failures) == set(LINES)
    assert run.errors == {"test_a_fixture"}
    assert BEHAVING - run.passed - set(LINES) == {"test_a_skip", "test_an_expected_stray", "test_expected"}


@in_one_process_and_in_two
@pytest.mark.parametrize("name", sorted(set(LINES) - {FAILS_ANYWAY}))
def test_each_failure_names_the_line(planted: Callable[..., Run], name: str, processes: tuple[str, ...]) -> None:
    message = planted(ERROR, *processes).failures[name]
    assert re.search(rf"(^|[\s/]){re.escape(LINES[name])}\b", message), message
    assert "cuda:" in message or "patched over" in message


@in_one_process_and_in_two
def test_a_test_that_fails_anyway_keeps_its_own_failure(
    planted: Callable[..., Run], processes: tuple[str, ...]
) -> None:
    run = planted(ERROR, *processes)
    assert run.failures[FAILS_ANYWAY].startswith("AssertionError: assert 4 == 5")
    section = re.search(r"^-+ devguard -+\n(.*\n.*)", run.stdout, re.MULTILINE)
    assert section is not None
    assert LINES[FAILS_ANYWAY] in section[1]


@in_one_process_and_in_two
def test_the_traceback_of_a_stray_ends_at_its_line(planted: Callable[..., Run], processes: tuple[str, ...]) -> None:
    message = planted(ERROR, *processes).failures["test_a_stray_in_a_library"]
    assert message.rstrip().endswith(f"{LINES['test_a_stray_in_a_library']}: StrayDeviceError")
    assert "/devguard/" not in message.replace(str(PLANTED), "")


def test_the_summary_counts_per_call_site_most_bytes_first(planted: Callable[..., Run]) -> None:
    stdout = planted(ERROR).stdout
    summary = stdout.partition("= devguard: ")[2].partition("short test summary")[0]
    sizes = [int(size) for size in re.findall(r"x, (\d+) bytes", summary)]
    assert sizes[:2] == [80, 64]
    assert sizes == sorted(sizes, reverse=True)
    site = LINES["test_a_stray_in_a_library"]
    assert f"{site} in decode: 3 x, 80 bytes\n    return pickle.loads(data)" in summary
    assert "  in test_strays.py::test_a_stray_in_a_library, test_strays.py::test_it_swallows_the_error, " in summary


def test_the_header_names_the_mode_and_the_owner(planted: Callable[..., Run]) -> None:
    assert "\ndevguard: mode error, owner cuda:0; 4 simulated GPUs" in planted(ERROR).stdout
    several = planted(ERROR, "-n", "2").stdout
    assert "\ndevguard: mode error, each xdist worker owns one GPU; 4 simulated GPUs" in several


def test_a_placed_thread_is_not_reported(planted: Callable[..., Run]) -> None:
    assert "test_a_thread_that_devguard_places" not in planted(ERROR).stdout


def test_strays_of_every_worker_reach_the_summary(planted: Callable[..., Run]) -> None:
    alone, several = (planted(ERROR, *processes).stdout for processes in [(), ("-n", "2")])
    for name in set(LINES) - {"test_a_bare_cuda"}:
        assert re.search(rf"^{re.escape(LINES[name])} in \S+: \d x", alone, re.MULTILINE), name
        assert re.search(rf"^{re.escape(LINES[name])} in \S+: \d x", several, re.MULTILINE), name


def test_in_mode_repair_no_test_fails_and_every_stray_is_reported(planted: Callable[..., Run]) -> None:
    run = planted("--devguard=repair", "test_strays.py")
    # One test sets mode error itself, and torch refuses to export memory that is not on the current device.
    assert set(run.failures) == {FAILS_ANYWAY, "test_a_thread_on_device_0", "test_memory_of_another_framework"}
    for name in LINES:
        assert f"{LINES[name]} in " in run.stdout.partition("= devguard: ")[2]
    assert "load: cuda:3 -> cuda:0, owner cuda:0: repaired" in run.stdout


def test_in_mode_observe_no_test_fails_and_every_stray_is_reported_but_not_repaired(
    planted: Callable[..., Run],
) -> None:
    run = planted("--devguard=observe", "test_strays.py", "-k", "leaves")
    assert not run.failures
    assert len(run.passed) == 4
    for name in run.passed:
        assert f"{LINES[name]} in " in run.stdout.partition("= devguard: ")[2]
    assert "set_device: cuda:3, owner cuda:0: observed" in run.stdout
    assert "cuda:2 was left as the current device; the test began on cuda:3" in run.stdout
