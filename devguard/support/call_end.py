"""Call a function when the call that the user's code is making on this thread has returned.

Code that runs inside that call, such as the initialisation of CUDA, cannot see what the rest of the call does. Python's
profiling hook can. It is set for this one call, and only if no profiler uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from devguard.support import callsite

__all__ = ["call_afterwards"]

MAX_EVENTS = 100_000  # each costs a Python call: a longer call is not worth it


def call_afterwards(start: FrameType, function: Callable[[], object]) -> bool:
    """Call `function` once, after the call that the innermost frame of user code outside `start` is making.

    Parameters
    ----------
    start : frame
        The frame from which the user's code is searched outwards.
    function : callable
        Called on this thread, without arguments; what it raises is lost.

    Returns
    -------
    bool
        Whether `function` will be called; not if there is no user code, or if a profiler is active on this thread.
    """
    frame = callsite.user_frame(start)
    if frame is None or sys.getprofile() is not None:
        return False
    sys.setprofile(_Watch(frame, function))
    return True


class _Watch:
    """The hook: waits for the next event in a frame, or for the next function that the frame calls."""

    __slots__ = ("_events", "_frame", "_function")

    def __init__(self, frame: FrameType, function: Callable[[], object]) -> None:
        self._frame = frame
        self._function = function
        self._events = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self._events += 1
        has_returned = frame is self._frame or (event == "call" and frame.f_back is self._frame)
        if not has_returned and self._events < MAX_EVENTS:
            return
        sys.setprofile(None)
        if has_returned:
            try:
                self._function()
            except Exception:  # noqa: BLE001 - it would reach the user's code, at a line that has nothing to do with it
                return
