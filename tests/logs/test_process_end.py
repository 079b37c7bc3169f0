"""How processes ended, from the journals of all of them."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from devguard.logs import process_end
from devguard.logs.process_end import ChildEnd
from devguard.logs.reader import Process
from devguard.support import process_identity
from tests.helpers.fakeproc import NEVER

HERE = process_identity.pid_space()


def process(pid: int, **known: Any) -> Process:
    return Process(f"{pid}.jsonl", pid, **{"host": "node7", "pid_space": HERE, "time": 10.0, "started": 5, **known})


def settled(*processes: Process) -> list[str]:
    process_end.settle(processes)
    return [process_end.describe(each) for each in processes]


def test_a_process_without_a_last_line_runs_or_is_lost() -> None:
    own = process(os.getpid(), started=process_identity.started(os.getpid()))
    stranger = process(os.getpid(), started=own.started + 1)  # Its pid was given to this process later.
    assert settled(own, process(NEVER), stranger) == [
        "running",
        "killed or crashed (no last line)",
        "killed or crashed (no last line)",
    ]


def test_what_another_machine_or_an_old_log_does_not_tell_is_unknown() -> None:
    elsewhere = process(os.getpid(), pid_space="another boot pid:[7]")
    old = process(os.getpid(), pid_space="", started=0)
    assert [text.split(",")[0] for text in settled(elsewhere, old)] == ["running", "running"]
    assert [each.end for each in (elsewhere, old)] == ["unknown", "unknown"]
    assert not process_end.has_died(elsewhere)


ENDS: list[tuple[bool, ChildEnd | None, str, bool]] = [
    (True, None, "ended", False),
    (True, ChildEnd(NEVER, None, 1, 20.0), "ended with status 1", False),
    (True, ChildEnd(NEVER, "SIGKILL", None, 20.0), "wrote its last line, then was killed by SIGKILL", True),
    (False, ChildEnd(NEVER, "SIGKILL", None, 20.0), "killed by SIGKILL", True),
    (False, ChildEnd(NEVER, None, 3, 20.0), "left with status 3, without a last line", True),
    (False, None, "killed or crashed (no last line)", True),
]


@pytest.mark.parametrize(("ended", "end", "text", "died"), ENDS, ids=[text for _, _, text, _ in ENDS])
def test_the_parent_tells_what_the_child_cannot(ended: bool, end: ChildEnd | None, text: str, died: bool) -> None:
    parent = process(1, children=[end] if end else [], ended=True)
    child = process(NEVER, ended=ended)
    assert settled(parent, child) == ["ended", text]
    assert process_end.has_died(child) == died


def test_the_end_belongs_to_the_newest_process_with_the_pid_that_had_started_in_any_order_of_the_journals() -> None:
    for order in itertools.permutations(range(5)):
        parent = process(1, ended=True, children=[ChildEnd(NEVER, "SIGTERM", None, 21.0)])
        early = process(1, ended=True, children=[ChildEnd(NEVER, "SIGKILL", None, 20.0)], time=11.0)
        first, second, third = (process(NEVER, time=at, started=int(at)) for at in (10.0, 15.0, 30.0))
        found = (parent, early, first, second, third)
        process_end.settle([found[at] for at in order])
        assert [each.signal for each in found] == [None, None, None, "SIGKILL", None]  # The pid was free after that.
        assert [each.end_time for each in found] == [None, None, None, 20.0, None]
        assert [each.end for each in found[2:]] == ["lost", "killed", "lost"]


def test_a_parent_of_another_machine_or_container_says_nothing_of_this_one() -> None:
    end = ChildEnd(NEVER, "SIGKILL", None, 20.0)
    other_host = process(1, ended=True, host="node8", children=[end])
    other_space = process(1, ended=True, pid_space="another boot pid:[7]", children=[end])
    assert settled(other_host, other_space, process(NEVER))[2] == "killed or crashed (no last line)"


def test_a_process_that_became_another_program_is_not_lost() -> None:
    before, after = process(NEVER, time=10.0), process(NEVER, time=12.0, ended=True)
    assert settled(after, before) == ["ended", "became another program"]


def test_to_settle_again_gives_the_same() -> None:
    parent, child = process(1, ended=True, children=[ChildEnd(NEVER, "SIGKILL", None, 20.0)]), process(NEVER)
    assert settled(parent, child) == settled(parent, child)
    parent.children.clear()
    assert settled(parent, child)[1] == "killed or crashed (no last line)"
