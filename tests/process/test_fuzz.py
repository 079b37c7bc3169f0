"""A short run of ``python -m tests.fuzz``."""

from __future__ import annotations

import sys

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_input_gives_a_traceback(name: str) -> None:
    figures = fuzz.run(name, 300, seed=sys.hexversion)
    assert "faults" not in figures, figures["first"]
    assert sum(count for count in figures.values() if isinstance(count, int)) >= 300


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_fuzz_reports_a_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(fuzz.TARGETS, name, fail)
    figures = fuzz.run(name, 5, seed=0)
    assert figures["faults"] == 5
    assert "ZeroDivisionError" in figures["first"][0]
