"""The actions: what became of the work in a record, and whether it is a stray.

The only table of them: ``devguard log --help`` prints it, and a test compares it with docs/log.md.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import NamedTuple

from devguard.reporting.stray import LEFT, Action

__all__ = ["ACTIONS", "expand", "explain", "FAIL_ON", "is_stray", "LEFT_ALONE", "matches", "Meaning", "STRAYS"]


class Meaning(NamedTuple):
    """What an action means.

    Attributes
    ----------
    is_stray : bool
        Whether such a record counts as a stray.
    text : str
        One or two sentences.
    """

    is_stray: bool
    text: str


ACTIONS: dict[Action, Meaning] = {
    "repaired": Meaning(True, "The work was moved to the owner's device."),
    "refused": Meaning(True, "devguard raised StrayDeviceError (mode error)."),
    "observed": Meaning(True, "The work stayed where it was (mode observe, or no repair exists)."),
    "warned": Meaning(True, "As observed, with a warning at the line (mode warn)."),
    "placed": Meaning(False, "A thread or a task was started on the owner's device. It may never use a GPU."),
    "kept": Meaning(False, "The program named the device itself, so devguard left the work there."),
}
STRAYS: tuple[str, ...] = tuple(action for action, meaning in ACTIONS.items() if meaning.is_stray)
LEFT_ALONE: tuple[str, ...] = tuple(LEFT.values())  # the actions that leave a stray where it is
FAIL_ON: tuple[str, ...] = ("strays", *ACTIONS)  # the words of devguard log --fail-on; the first stands for all strays


def expand(words: Sequence[str]) -> tuple[str, ...]:
    """Return the actions that words of `FAIL_ON` name; all strays for no words."""
    named = [action for word in words or FAIL_ON[:1] for action in (STRAYS if word == FAIL_ON[0] else (word,))]
    return tuple(dict.fromkeys(named))


def is_stray(action: str) -> bool:
    """Return whether records of an action count as strays; those of an action that another release knows do."""
    return action in STRAYS or action not in ACTIONS


def matches(action: str, named: Collection[str]) -> bool:
    """Return whether an action is among the named ones; one of another release is if all strays are."""
    return action in named or (action not in ACTIONS and set(STRAYS) <= set(named))


def explain(columns: int) -> str:
    """Return the table as text of at most that many columns, for a terminal."""
    lines = _explain_some("actions of strays:", STRAYS, columns)
    others = [action for action in ACTIONS if action not in STRAYS]
    return "\n".join([*lines, "", *_explain_some("actions that never count as strays:", others, columns)])


def _explain_some(title: str, names: Sequence[str], columns: int) -> list[str]:
    texts = {str(action): meaning.text for action, meaning in ACTIONS.items()}
    lines = [title]
    for name in names:
        lines += textwrap.wrap(f"  {name:<10}{texts[name]}", columns, subsequent_indent=" " * 12)
    return lines
