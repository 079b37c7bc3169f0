"""The matrix of all classes of strays, live: the counts that devguard promises, and no false stray.

The tests run one variant of each class; ``python -m tests.matrix`` runs all cases in all modes and prints the table.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import simulated
from tests.matrix import table

DETECTED, REPAIRED = 18, 13


@pytest.mark.skipif(not simulated.POSSIBLE, reason="simulated GPUs exist for Linux on x86-64 only")
def test_classes_are_detected_at_their_lines_and_repaired_without_false_strays() -> None:
    first_variants = [name for name, title in table.cases().items() if "(" not in title]
    rows = table.run(first_variants, modes=("observe", "repair", "behaves", "allowed"))
    counts, shown = table.count(rows), json.dumps(rows, indent=1)
    assert counts["classes"] == table.CLASSES, shown
    assert counts["detected"] - counts["around"] >= DETECTED, shown
    assert counts["repaired"] >= REPAIRED, shown
    assert counts["false strays"] == 0, shown
    assert counts["false cells"] == 0, shown
    assert counts["allowed"] == table.CLASSES, shown


# --- the judgement, with made-up reports ---

CASE = "pickle_tag"
FILE, LINE = table.marked(CASE)


def stray(action: str = "observed", line: int = LINE) -> dict[str, Any]:
    return {"door": "load", "action": action, "source": "cuda:0", "file": FILE, "line": line}


def cell(*strays: dict[str, Any], contexts: tuple[int, ...] = (1,), **changes: Any) -> dict[str, Any]:
    held = {"contexts": list(contexts), "bytes": {str(index): 512 for index in contexts}}
    return {"strays": list(strays), "error": None, "repaired": True, "opens": (), **held, **changes}


def test_detected_means_a_stray_at_the_marked_line() -> None:
    assert table.judge(CASE, {"observe": cell(stray())})["detected"]
    assert not table.judge(CASE, {"observe": cell(stray(line=LINE + 1))})["detected"]
    assert not table.judge(CASE, {"observe": cell()})["detected"]


@pytest.mark.parametrize(
    ("repair", "expected"),
    [
        (cell(stray("repaired")), True),
        (cell(stray()), False),
        (cell(stray("repaired"), contexts=(0, 1)), False),
        (cell(stray("repaired"), contexts=(0, 1), opens=(0,)), False),
        (cell(stray("repaired"), contexts=(0, 1), opens=(0,), bytes={"0": 0, "1": 512}), True),
        (cell(stray("repaired"), repaired=False), False),
        (cell(stray("repaired"), repaired=None), True),
        (cell(stray("repaired"), error="RuntimeError: no"), False),
    ],
    ids=["yes", "left", "context", "bytes", "a library's context", "elsewhere", "no opinion", "failed"],
)
def test_repaired_means_a_recorded_repair_and_nothing_on_other_devices(repair: dict[str, Any], expected: bool) -> None:
    assert table.judge(CASE, {"repair": repair})["repaired"] is expected


def test_refused_means_devguards_error_and_a_stray_or_error_of_the_twin_is_a_false_stray() -> None:
    row = table.judge(CASE, {"error": cell(error="StrayDeviceError: load: no"), "behaves": cell(stray())})
    assert (row["refused"], table.count([row])["false strays"]) == (True, 1)
    row = table.judge(
        CASE, {"error": cell(error="RuntimeError: StrayDeviceError"), "behaves": cell(error="OSError: x")}
    )
    assert (row["refused"], table.count([row])["false strays"]) == (False, 1)


def test_allowed_means_no_stray_and_no_error() -> None:
    for report, expected in ((cell(), True), (cell(stray()), False), (cell(error="StrayDeviceError: no"), False)):
        assert table.judge(CASE, {"allowed": report})["allowed"] is expected


def test_a_class_counts_as_detected_if_all_variants_are_and_as_repaired_if_one_is() -> None:
    variants = [
        {"class": "A", "door": "load", "detected": True, "repaired": True},
        {"class": "A", "door": "load", "detected": True, "repaired": False},
        {"class": "B", "door": "native", "detected": True, "repaired": False},
        {"class": "C", "door": "load", "detected": True, "repaired": False},
        {"class": "C", "door": None, "detected": False, "repaired": False},
    ]
    counts = table.count(variants)
    assert [counts[name] for name in ("classes", "detected", "around", "repaired")] == [3, 2, 1, 1]
