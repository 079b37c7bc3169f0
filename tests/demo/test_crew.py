"""The rank processes: they answer, die or do not answer, and none is left running."""

from __future__ import annotations

import pytest

from devguard.demo import DemoError
from devguard.demo.crew import Crew
from tests.demo import entries


def test_all_ranks_answer_and_exit():
    with Crew(2, entries.echo, "") as crew:
        crew.send("hello")
        assert crew.gather("answer") == [(0, "hello"), (1, "hello")]
    assert [process.exitcode for process in crew.processes] == [0, 0]


def send_to_rank_0(crews, entry, **options):
    """Start two ranks, send to rank 0 only, and wait for both. The crew is appended to `crews` for later checks."""
    with Crew(2, entry, "", **options) as crew:
        crews.append(crew)
        crew.send("hello", 0)
        crew.gather("answer")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (entries.one_exits, r"rank 1 \(pid \d+\) ended before it answered: exit status 3\."),
        (entries.one_is_killed, r"rank 1 \(pid \d+\) ended before it answered: killed by SIGKILL\."),
        (entries.one_fails, r"rank 1 failed\.\nValueError: no such layer"),
    ],
)
def test_a_rank_that_dies_or_fails_is_an_error_with_the_cause(entry, message):
    crews = []
    with pytest.raises(DemoError, match=message):
        send_to_rank_0(crews, entry)
    assert all(process.exitcode is not None for process in crews[0].processes)


def test_sending_to_a_dead_rank_is_an_error_with_the_exit_status():
    with Crew(2, entries.one_exits, "") as crew:
        crew.processes[1].join()
        with pytest.raises(DemoError, match=r"rank 1 .* exit status 3"):
            crew.send("hello", 1)


def test_a_rank_that_does_not_answer_is_named_and_ended():
    crews = []
    with pytest.raises(DemoError, match=r"no answer within 0\.5 s from: .*rank 1\."):
        send_to_rank_0(crews, entries.one_is_silent, limit=0.5)
    assert all(process.exitcode is not None for process in crews[0].processes)
