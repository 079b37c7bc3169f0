"""What to write at a line that strays."""

from __future__ import annotations

from devguard.doors.table import NAMES
from devguard.reporting.advice import ADVICE, advise


def test_each_door_has_an_advice() -> None:
    assert sorted(ADVICE) == sorted(NAMES)
    assert all(text.endswith(".") for text in ADVICE.values())


def test_what_the_program_named_or_devguard_placed_needs_another_advice() -> None:
    assert advise("load", "observed") == advise("load") == ADVICE["load"]
    assert "names that device itself" in advise("load", "kept")
    assert advise("threads", "placed").startswith("Nothing to do")


def test_a_door_of_another_release_has_the_advice_for_all() -> None:
    assert "devguard.unguarded()" in advise("teleport", "observed")
