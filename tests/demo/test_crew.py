"""The rank processes: answers, deaths, silence, and that none is left behind."""

from __future__ import annotations

import pytest

from devguard.demo import DemoError
from devguard.demo.crew import Crew
from tests.demo import entries


def test_every_rank_answers_and_ends():
    with Crew(2, entries.echo, "") as crew:
        crew.tell("hello")
        assert crew.gather("answer") == [(0, "hello"), (1, "hello")]
    assert [process.exitcode for process in crew.processes] == [0, 0]


def ask(crews, entry, **options):
    """Start two ranks, speak to rank 0 only, and wait for both; `crews` gets the crew, to look at afterwards."""
    with Crew(2, entry, "", **options) as crew:
        crews.append(crew)
        crew.tell("hello", 0)
        crew.gather("answer")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (entries.one_exits, r"rank 1 \(pid \d+\) ended before it answered: exit status 3\."),
        (entries.one_is_killed, r"rank 1 \(pid \d+\) ended before it answered: killed by SIGKILL\."),
        (entries.one_fails, r"rank 1 failed\.\nValueError: no such layer"),
    ],
)
def test_a_rank_that_dies_is_an_error_that_says_how(entry, said):
    crews = []
    with pytest.raises(DemoError, match=said):
        ask(crews, entry)
    assert all(process.exitcode is not None for process in crews[0].processes)


def test_a_command_to_a_dead_rank_says_how_it_died():
    with Crew(2, entries.one_exits, "") as crew:
        crew.processes[1].join()
        with pytest.raises(DemoError, match=r"rank 1 .* exit status 3"):
            crew.tell("hello", 1)


def test_a_silent_rank_is_named_and_ended():
    crews = []
    with pytest.raises(DemoError, match=r"no answer within 0\.5 s from: .*rank 1\."):
        ask(crews, entries.one_is_silent, patience=0.5)
    assert all(process.exitcode is not None for process in crews[0].processes)
