"""Compares a suite's run under devguard with its run without: what got worse, and whether the guard was there."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.others import suites
from tests.others.suites import Run, Suite

__all__ = ["Verdict", "judge", "unguarded_by", "worse"]

TRIES = 2  # more, of a test that got worse: many wait for a second or two, and a busy machine fails them
MISSING = "missing"  # the run ended before it, or never collected it
RANKS = {"passed": 0, "xfailed": 0, "skipped": 1, "xpassed": 2, "failed": 2, "error": 2, MISSING: 3}


@dataclasses.dataclass
class Verdict:
    """What a suite showed.

    Attributes
    ----------
    suite, owner : str
        Which, under which owner.
    counts : dict of str to int
        How many tests ended how, guarded.
    already : dict of str to str
        Tests that fail without devguard, too, and how.
    worse : dict of str to str
        Tests that got worse, each time: from what to what.
    unsteady : list of str
        Tests that got worse, and not when run again.
    guard : list of str
        Why the guard was not what it should have been.
    children : int
        How many children `multiprocessing` spawned, each with torch imported and every door open.
    records : int
        How many strays devguard recorded in the process itself.
    seconds : tuple of float
        What the run took unguarded and guarded.
    details : dict of str to str
        The end of the error of each test that got worse.
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
        """Whether no test got worse, and devguard was in force from the first to the last."""
        return not self.worse and not self.guard


def judge(suite: Suite, owner: str, targets: tuple[str, ...] = ()) -> Verdict:
    """Run a suite, or only `targets` of it, without devguard and with it; what got worse is run again."""
    said = Verdict(suite.about, owner)
    if reason := suite.missing():
        said.guard = [f"not run: {reason}"]
        return said
    plain = suites.run(suite, owner, guarded=False, targets=targets)
    guarded = suites.run(suite, owner, guarded=True, targets=targets)
    said.seconds = (plain.seconds, guarded.seconds)
    for outcome in guarded.outcomes.values():
        said.counts[outcome] = said.counts.get(outcome, 0) + 1
    said.already = {test: outcome for test, outcome in plain.outcomes.items() if RANKS[outcome] >= RANKS["failed"]}
    said.children = len(guarded.children)
    said.records = guarded.guard.get("after", {}).get("records", 0) - guarded.guard.get("before", {}).get("records", 0)
    said.guard = unguarded_by(guarded, owner)
    if not plain.outcomes:
        said.guard.append(f"no test ran, even without devguard:\n{plain.output}")
    found = worse(plain.outcomes, guarded.outcomes)
    said.worse = dict(found)
    for _ in range(TRIES):
        if said.worse:
            again = suites.run(suite, owner, guarded=True, targets=tuple(said.worse))
            still = worse(plain.outcomes, {**guarded.outcomes, **again.outcomes})
            said.worse = {test: change for test, change in said.worse.items() if test in still}
    said.unsteady = sorted(set(found) - set(said.worse))
    said.details = {test: guarded.details.get(test, guarded.output) for test in said.worse}
    return said


def worse(plain: dict[str, str], guarded: dict[str, str]) -> dict[str, str]:
    """Return the tests whose outcome is worse in the second run, with ``from -> to``."""
    changes = {test: (before, guarded.get(test, MISSING)) for test, before in plain.items()}
    # an error of a whole class or module has an identity of its own
    changes.update({test: ("passed", after) for test, after in guarded.items() if test not in plain})
    return {test: f"{old} -> {new}" for test, (old, new) in changes.items() if RANKS[new] > RANKS[old]}


def unguarded_by(run: Run, owner: str) -> list[str]:
    """Return what shows that devguard was not in force throughout a run; empty where it was."""
    wrong = []
    for when in ("before", "after"):
        state = run.guard.get(when)
        if state is None:
            wrong.append(f"the run did not come to the point {when!r}: exit status {run.returncode}\n{run.output}")
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
