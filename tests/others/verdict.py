"""Compare a suite's run under devguard with a run without it: worse tests, and whether the guard was in force."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.others import suites
from tests.others.suites import Run, Suite

__all__ = ["Verdict", "judge", "unguarded_by", "worse"]

TRIES = 2  # Further runs of a worse test: many wait only a second or two and fail on a busy machine.
MISSING = "missing"  # The run ended before the test, or never collected it.
RANKS = {"passed": 0, "xfailed": 0, "skipped": 1, "xpassed": 2, "failed": 2, "error": 2, MISSING: 3}


@dataclasses.dataclass
class Verdict:
    """The result of a suite.

    Attributes
    ----------
    suite, owner : str
        The suite and the owner.
    counts : dict of str to int
        The number of tests by outcome, guarded.
    already : dict of str to str
        Tests that also fail without devguard, and their outcome.
    worse : dict of str to str
        Tests that are worse in each guarded run: the outcome without and with devguard.
    unsteady : list of str
        Tests that are worse at first, but not when run again.
    guard : list of str
        The ways in which the guard was not in force.
    children : int
        The number of children that `multiprocessing` spawned, each with torch imported and every door open.
    records : int
        The number of strays that devguard recorded in the process itself.
    seconds : tuple of float
        The time of the run, unguarded and guarded.
    details : dict of str to str
        The end of the error of each worse test.
    """

    suite: str
    owner: str
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    already: dict[str, str] = dataclasses.field(default_factory=dict)
    worse: dict[str, str] = dataclasses.field(default_factory=dict)
    unsteady: list[str] = dataclasses.field(default_factory=list)
    guard: list[str] = dataclasses.field(default_factory=list)
    children: int = 0
    records: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    details: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Whether no test is worse, and devguard was in force from the first test to the last."""
        return not self.worse and not self.guard


def judge(suite: Suite, owner: str, targets: tuple[str, ...] = ()) -> Verdict:
    """Run a suite, or only `targets` of it, without and with devguard; run worse tests again."""
    verdict = Verdict(suite.about, owner)
    if reason := suite.missing():
        verdict.guard = [f"not run: {reason}"]
        return verdict
    plain = suites.run(suite, owner, guarded=False, targets=targets)
    guarded = suites.run(suite, owner, guarded=True, targets=targets)
    verdict.seconds = (plain.seconds, guarded.seconds)
    for outcome in guarded.outcomes.values():
        verdict.counts[outcome] = verdict.counts.get(outcome, 0) + 1
    verdict.already = {test: outcome for test, outcome in plain.outcomes.items() if RANKS[outcome] >= RANKS["failed"]}
    verdict.children = len(guarded.children)
    before, after = (guarded.guard.get(when, {}).get("records", 0) for when in ("before", "after"))
    verdict.records = after - before
    verdict.guard = unguarded_by(guarded, owner)
    if not plain.outcomes:
        verdict.guard.append(f"no test ran, even without devguard:\n{plain.output}")
    found = worse(plain.outcomes, guarded.outcomes)
    verdict.worse = dict(found)
    for _ in range(TRIES):
        if verdict.worse:
            again = suites.run(suite, owner, guarded=True, targets=tuple(verdict.worse))
            still = worse(plain.outcomes, {**guarded.outcomes, **again.outcomes})
            verdict.worse = {test: change for test, change in verdict.worse.items() if test in still}
    verdict.unsteady = sorted(set(found) - set(verdict.worse))
    verdict.details = {test: guarded.details.get(test, guarded.output) for test in verdict.worse}
    return verdict


def worse(plain: dict[str, str], guarded: dict[str, str]) -> dict[str, str]:
    """Return the tests whose outcome is worse in the second run, with ``from -> to``."""
    changes = {test: (before, guarded.get(test, MISSING)) for test, before in plain.items()}
    # An error of a whole class or module has its own name, which the plain run lacks.
    changes.update({test: ("passed", after) for test, after in guarded.items() if test not in plain})
    return {test: f"{old} -> {new}" for test, (old, new) in changes.items() if RANKS[new] > RANKS[old]}


def unguarded_by(run: Run, owner: str) -> list[str]:
    """Return the reasons why devguard was not in force throughout a run; empty if it was."""
    wrong = []
    for when in ("before", "after"):
        state = run.guard.get(when)
        if state is None:
            wrong.append(f"the run did not reach the point {when!r}: exit status {run.returncode}\n{run.output}")
            continue
        if state["owner"] != owner or state.get("mode") != "repair":
            wrong.append(f"{when}: the owner is {state['owner']}, the mode {state.get('mode')}")
        if state.get("placed") not in (None, owner):
            wrong.append(f"{when}: a thread starts on {state['placed']}")
        wrong += _doors(when, state)
    for child in run.children:
        wrong += _doors("in a child", child)
    return wrong


def _doors(when: str, state: dict[str, Any]) -> list[str]:
    wrong = [f"{when}: the door {name} is not open" for name in state["closed"]]
    if not state["doors"]:
        wrong.append(f"{when}: there are no doors")
    return wrong + [f"{when}: devguard itself failed: {text}" for text in state.get("failures", ())]
