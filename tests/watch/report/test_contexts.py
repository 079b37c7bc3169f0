"""When each context was first seen, and by which process."""

from __future__ import annotations

from pathlib import Path

from devguard.watch.report.run import read
from tests.helpers.journals import MIB, START, Log, make_run


def test_contexts_on_gpus_of_others_come_first_with_the_line_that_put_something_there(tmp_path: Path) -> None:
    found = read(make_run(tmp_path)).contexts
    assert [(c.place, c.device, c.verdict, round(c.time - START, 1)) for c in found] == [
        (2, "cuda:0", "ctx", 1.6),
        (1, "cuda:0", "STRAY", 3.0),
        (0, "cuda:0", "own", 1.0),
        (1, "cuda:1", "own", 1.5),
        (2, "cuda:2", "own", 1.6),
        (3, "cuda:3", "own", 1.7),
    ]
    assert [context.line for context in found[:3]] == ["", "/srv/train.py:7 in main (door load)", ""]
    assert [context.is_misplaced for context in found] == [True, True, False, False, False, False]


def test_a_context_from_before_the_owner_was_known_is_judged_by_that_owner(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, None, ["cuda:1"])
    log.state(2.0, "cuda:1", ["cuda:1"])
    log.state(3.0, None, ["cuda:1"])
    ((context),) = read(tmp_path).contexts
    assert (context.verdict, context.time) == ("own", START + 1.0)


def test_the_first_line_is_the_first_one_that_left_something_there(tmp_path: Path) -> None:
    log = Log(tmp_path, 1)
    log.state(1.0, "cuda:1", ["cuda:0"])
    log.stray(1.0, "cuda:0", "cuda:1", site={"file": "/a.py", "line": 1, "function": "f"})  # repaired
    log.stray(4.0, "cuda:0", "cuda:0", site={"file": "/b.py", "line": 2, "function": "g"})
    log.stray(2.0, "cuda:0", "cuda:0", site={"file": "/c.py", "line": 3, "function": "h"}, action="kept")
    log.stray(1.0, "cuda:0", "cuda:0", site=None, door="native")
    log.sample(5.0, {"cuda:0": MIB})
    ((context),) = read(tmp_path).contexts
    assert context.line == "/c.py:3 in h (door load)"
