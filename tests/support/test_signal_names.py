"""The names of signals, also of those without one."""

from __future__ import annotations

import signal

import pytest

from devguard.support.signal_names import name_signal


@pytest.mark.parametrize(
    ("number", "name"),
    [(9, "SIGKILL"), (15, "SIGTERM"), (signal.SIGRTMIN + 1, f"signal {signal.SIGRTMIN + 1}"), (500, "signal 500")],
)
def test_a_signal_has_a_name_or_its_number(number: int, name: str) -> None:
    assert name_signal(number) == name
