"""The names of signals."""

from __future__ import annotations

import signal

__all__ = ["name_signal"]


def name_signal(number: int) -> str:
    """Return the name of a signal, also of one that has only a number."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
