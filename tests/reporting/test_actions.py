"""The table of actions."""

from __future__ import annotations

from typing import get_args

import pytest

from devguard.reporting import actions
from devguard.reporting.stray import Action


def test_every_action_is_in_the_table_and_no_other() -> None:
    assert sorted(actions.ACTIONS) == sorted(get_args(Action))


def test_work_that_was_placed_or_that_the_program_named_is_no_stray() -> None:
    assert {action for action in actions.ACTIONS if not actions.is_stray(action)} == {"placed", "kept"}
    assert sorted(actions.STRAYS) == ["observed", "refused", "repaired", "warned"]


def test_only_observed_and_warned_strays_are_left_where_they_are() -> None:
    assert sorted(actions.LEFT_ALONE) == ["observed", "warned"]
    assert set(actions.LEFT_ALONE) <= set(actions.STRAYS)


def test_an_action_of_another_release_counts_as_a_stray() -> None:
    assert actions.is_stray("moved")
    assert actions.matches("moved", actions.STRAYS)
    assert actions.matches("moved", (*actions.STRAYS, "kept"))
    assert not actions.matches("moved", ("repaired", "observed"))
    assert not actions.matches("kept", actions.STRAYS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), actions.STRAYS),
        (("strays",), actions.STRAYS),
        (("kept", "observed"), ("kept", "observed")),
        (("observed", "strays", "kept"), ("observed", "repaired", "refused", "warned", "kept")),
    ],
    ids=["none", "strays", "two", "strays and another"],
)
def test_words_name_actions(words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert actions.expand(words) == expected


@pytest.mark.parametrize("columns", [40, 78, 200])
def test_the_explanation_fits_the_terminal_and_names_each_action(columns: int) -> None:
    text = actions.explain(columns)
    assert max(map(len, text.splitlines())) <= columns
    strays, _, others = text.partition("never count as strays")
    for action in actions.ACTIONS:
        assert (f"\n  {action} " in strays) == actions.is_stray(action)
        assert (f"\n  {action} " in others) == (not actions.is_stray(action))
    assert " ".join(actions.ACTIONS["placed"].text.split()) in " ".join(text.split())
