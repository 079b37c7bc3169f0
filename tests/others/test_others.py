"""The fastest suites of other projects under devguard; ``python -m tests.others`` runs all suites in full."""

from __future__ import annotations

import pytest

from tests.helpers import simulated
from tests.others import suites, verdict
from tests.others.suites import SUITES, Run

# Classes that use most of the functions that the doors patch, and take only seconds.
STANDARD = (
    *(
        f"test.test_threading.{name}"
        for name in ("ThreadTests", "ThreadingExceptionTests", "ExceptHookTests", "TimerTests")
    ),
    *(f"test.test_pickle.{name}" for name in ("CPicklerTests", "PyPicklerHookTests", "PyIdPersPicklerTests")),
)
# These tests take half of the time.
SLOW = "extended_arg or interactively_defined or deterministic or locally_defined or memoryview"

FINE = {"guard": "before", "owner": "cpu", "mode": "repair", "doors": 17, "closed": [], "failures": []}


def check(name: str, owner: str, targets: tuple[str, ...] = ()) -> None:
    """Run a suite under devguard; a test may fail only if it also fails without devguard."""
    suite = SUITES[name]
    if reason := suite.missing():  # Python of Debian, Ubuntu and some images comes without CPython's tests.
        pytest.skip(reason)
    guarded = suites.run(suite, owner, guarded=True, targets=targets)
    assert verdict.unguarded_by(guarded, owner) == []
    assert "passed" in guarded.outcomes.values()
    if any(verdict.RANKS[outcome] >= verdict.RANKS["failed"] for outcome in guarded.outcomes.values()):
        plain = suites.run(suite, owner, guarded=False, targets=targets)
        assert {test: guarded.details[test] for test in verdict.worse(plain.outcomes, guarded.outcomes)} == {}


@pytest.mark.skipif(not simulated.POSSIBLE, reason="simulated GPUs exist for Linux on x86-64 only")
def test_threads_and_pickles_of_the_standard_library_pass_with_a_gpu_as_owner() -> None:
    check("test_threading", "cuda:1", STANDARD)


def test_cloudpickle_passes_with_the_cpu_as_owner() -> None:
    check("cloudpickle", "cpu", ("tests/cloudpickle_test.py::CloudPickleTest", "-k", f"not ({SLOW})"))


@pytest.mark.parametrize(
    ("before", "after"),
    [("passed", "failed"), ("passed", "skipped"), ("skipped", "error"), ("xfailed", "xpassed"), ("passed", "missing")],
)
def test_a_worse_outcome_is_reported(before: str, after: str) -> None:
    guarded = {} if after == "missing" else {"a": after}
    assert verdict.worse({"a": before}, guarded) == {"a": f"{before} -> {after}"}


def test_a_test_that_failed_before_or_is_better_now_is_not_worse() -> None:
    assert (
        verdict.worse({"a": "failed", "b": "skipped", "c": "error"}, {"a": "error", "b": "passed", "c": "failed"}) == {}
    )


def test_an_error_that_only_the_guarded_run_has_is_worse() -> None:
    assert verdict.worse({"a": "passed"}, {"a": "passed", "setUpClass (x)": "error"}) == {
        "setUpClass (x)": "passed -> error"
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"owner": None}, "the owner is None"),
        ({"mode": "observe"}, "the mode observe"),
        ({"closed": ["threads"]}, "the door threads is not open"),
        ({"doors": 0}, "there are no doors"),
        ({"placed": "cuda:0"}, "a thread starts on cuda:0"),
        ({"failures": ["threads: KeyError"]}, "devguard itself failed: threads: KeyError"),
    ],
)
def test_a_run_without_the_guard_in_force_is_reported(change: dict[str, object], expected: str) -> None:
    run = Run({}, {}, {"before": FINE, "after": {**FINE, **change}}, [], 0.0, 0, "")
    (text,) = verdict.unguarded_by(run, "cpu")
    assert "after" in text
    assert expected in text


def test_a_run_that_did_not_finish_is_reported() -> None:
    (text,) = verdict.unguarded_by(Run({}, {}, {"before": FINE}, [], 0.0, -9, "Killed"), "cpu")
    assert "exit status -9" in text
    assert "Killed" in text


def test_a_spawned_child_with_a_closed_door_is_reported() -> None:
    child = {**FINE, "guard": "child", "closed": ["load"]}
    run = Run({}, {}, {"before": FINE, "after": FINE}, [child], 0.0, 0, "")
    assert verdict.unguarded_by(run, "cpu") == ["in a child: the door load is not open"]
