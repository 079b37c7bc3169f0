"""The verdict in one line, and its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devguard.watch.report.run import read
from devguard.watch.report.summary import as_dict, summarize
from tests.helpers.journals import MIB, START, Log, make_run


def test_the_numbers_are_those_of_the_log(tmp_path: Path) -> None:
    found = as_dict(read(make_run(tmp_path)))
    assert json.loads(json.dumps(found)) == found
    sites, gpus = found.pop("sites"), found.pop("gpus")
    assert found == {
        "verdict": "2 of 4 processes put up to 7.0 MiB and 2 contexts on GPUs that are not theirs; 8 strays at 1 line: "
        "3 observed, 5 repaired.",
        "is_clean": False,
        "processes": 4,
        "running": 0,
        "misplaced_processes": 2,
        "misplaced_contexts": 2,
        "misplaced_bytes": 7 * MIB + 512,
        "worst_moment": START + 6.0,
        "unknown_owners": 0,
        "strays": 8,
        "stray_bytes": 8 * MIB + 1,
        "lines": 1,
        "actions": {"observed": 3, "repaired": 5},
        "damaged": [],
    }
    assert [(site["action"], site["count"], site["bytes"]) for site in sites] == [
        ("observed", 3, 3 * MIB + 1),
        ("repaired", 5, 5 * MIB),
    ]
    assert gpus[0] == {"label": "0", "uuid": "uuid-0", "peak_bytes": 107 * MIB + 512, "peak_time": START + 6.0}


@pytest.mark.parametrize(
    ("contexts", "memory", "strays", "verdict", "is_clean"),
    [
        (["cuda:1"], {"cuda:1": 5}, [], "None of 1 process was seen on a GPU that is not its own; no strays.", True),
        (
            ["cuda:1"],
            {"cuda:1": 5},
            ["repaired"],
            "None of 1 process was seen on a GPU that is not its own; 1 stray at 1 line: 1 repaired.",
            True,
        ),
        (
            ["cuda:1"],
            {"cuda:1": 5},
            ["placed", "kept", "observed"],
            "None of 1 process was seen on a GPU that is not its own; 1 stray at 1 line: 1 observed.",
            False,
        ),
        (
            ["cuda:0", "cuda:1"],
            None,
            [],
            "1 of 1 process put 1 context on GPUs that are not theirs; no strays.",
            False,
        ),
        (
            ["cuda:0", "cuda:2"],
            {"cuda:0": MIB, "cuda:2": 2 * MIB},
            ["refused"],
            "1 of 1 process put up to 3.0 MiB and 2 contexts on GPUs that are not theirs; "
            "1 stray at 1 line: 1 refused.",
            False,
        ),
    ],
    ids=["healthy", "repaired", "left alone", "context", "memory"],
)
def test_the_verdict_in_words(
    tmp_path: Path,
    contexts: list[str],
    memory: dict[str, int] | None,
    strays: list[str],
    verdict: str,
    is_clean: bool,
) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", contexts)
    if memory is not None:
        log.sample(2.0, memory)
    for action in strays:
        log.stray(2.0, action=action)
    found: Any = summarize(read(tmp_path))
    assert (found.verdict, found.is_clean) == (verdict, is_clean)
    assert found.misplaced_bytes == (None if memory is None else sum(b for tag, b in memory.items() if tag != "cuda:1"))
