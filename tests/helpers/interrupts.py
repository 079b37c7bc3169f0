"""Interrupts (Ctrl-C) at a chosen line of devguard."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import devguard

PACKAGE = os.path.dirname(devguard.__file__) + os.sep


def is_uninterruptible(frame: FrameType) -> bool:
    """Return whether Python itself would raise no interrupt at a line: at ``try:``, and where a ``with`` block ends.

    Python looks for signals after calls and in loops. An exception in between would leave locks locked for good.
    """
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    starts = [start for start, _, line in frame.f_code.co_lines() if line == frame.f_lineno]
    return source == "try:" or (source.startswith("with ") and frame.f_lasti > min(starts))


def interrupt_at(line: int) -> Callable[..., Any]:
    """Return a trace function that raises KeyboardInterrupt at the n-th line that runs in devguard."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not is_uninterruptible(frame):
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Call `work`, with an interrupt at the n-th line of devguard; return whether that line was reached."""
    sys.settrace(interrupt_at(line))
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def lines(work: Callable[[], object]) -> int:
    """Return the number of lines of devguard that `work` runs."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line" and not is_uninterruptible(frame)
        return trace if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count
