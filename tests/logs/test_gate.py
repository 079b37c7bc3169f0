"""Which records fail a build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from devguard.logs import gate
from devguard.logs.baseline import Baseline
from devguard.logs.gate import Gate
from devguard.logs.selection import Selection
from tests.helpers.logs import ROOT, site

SITES = [
    site(number, action=action, function=action)
    for number, action in enumerate(("repaired", "refused", "observed", "warned", "placed", "kept", "moved"), 1)
]


def judge(fail_on: Sequence[str] = (), known: Baseline | None = None, **selected: Any) -> Gate:
    file = None if known is None else "base.json"
    return gate.judge(SITES, fail_on, known, file, root=ROOT, selection=Selection(**selected))


@pytest.mark.parametrize(
    ("fail_on", "failing"),
    [
        ((), ["repaired", "refused", "observed", "warned", "moved"]),  # The last one is of another release.
        (("strays",), ["repaired", "refused", "observed", "warned", "moved"]),
        (("observed", "refused"), ["refused", "observed"]),
        (("kept",), ["kept"]),
        (("placed",), ["placed"]),
    ],
    ids=str,
)
def test_records_fail_by_their_actions(fail_on: tuple[str, ...], failing: list[str]) -> None:
    assert [each.action for each in judge(fail_on).failing] == failing
    assert judge(fail_on).known == []


def test_known_strays_pass_and_new_ones_fail() -> None:
    known = Baseline.of(SITES[:3], ROOT, Baseline())
    found = judge((), known)
    assert [each.action for each in found.failing] == ["warned", "moved"]
    assert [each.action for each in found.known] == ["repaired", "refused", "observed"]
    assert found.vanished == []


def test_strays_that_vanished_are_those_of_the_selected_doors_and_of_all_ranks() -> None:
    gone = [site(function="gone"), site(function="gone", door="ipc")]
    known = Baseline.of([*SITES, *gone], ROOT, Baseline())
    assert [each.entry.key.door for each in judge((), known).vanished] == ["ipc", "load"]
    assert [each.entry.key.door for each in judge((), known, doors=("ipc", "native")).vanished] == ["ipc"]
    assert judge((), known, ranks=("0",)).vanished == []
    assert judge((), known).failing == []


def test_the_result_is_plain_data() -> None:
    known = Baseline.of([SITES[0], site(function="gone")], ROOT, Baseline())
    found = json.loads(json.dumps(judge(("repaired", "observed"), known).as_dict()))
    assert (found["passes"], found["fail_on"], found["baseline"]) == (False, ["repaired", "observed"], "base.json")
    assert [each["action"] for each in found["failing"]] == ["observed"]
    assert [each["action"] for each in found["known"]] == ["repaired"]
    assert found["vanished"] == [
        {"file": "serve.py", "function": "gone", "door": "load", "action": "observed", "owner": "cuda"}
        | {"lines": [43], "reason": None, "left": 0}
    ]
    assert judge(("kept",), Baseline.of(SITES, ROOT, Baseline())).as_dict()["passes"] is True
