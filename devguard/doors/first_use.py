"""The first initialisation of CUDA in this process, and the door that reports it.

The door ``first_touch`` writes the record. The door ``children`` describes it in a forked child, and reports the
initialisation itself in loader workers, which own no GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from devguard.support.callsite import Origin, Site

__all__ = ["describe", "door", "first", "record", "report_as", "Touch"]


class Touch(NamedTuple):
    """The first initialisation of CUDA.

    Attributes
    ----------
    origin : Origin
        The call site.
    pid : int
        The process.
    thread : str
        The name of the thread.
    time : float
        The time, in seconds since the epoch.
    unowned : bool
        Whether no scope was entered and the process had no owner.
    module : str
        The name of the module of the user's code; empty if there is none.
    """

    origin: Origin
    pid: int
    thread: str
    time: float
    unowned: bool
    module: str

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        code, line, via, stack = self.origin
        site = None if code is None else str(Site(code.co_filename, line, code.co_name))
        lines = [str(Site.of(frame)) for frame in stack]
        return {"site": site, "via": via, "pid": self.pid, "thread": self.thread, "time": self.time, "stack": lines}


class _State:
    """The first initialisation, and the door that reports it."""

    def __init__(self) -> None:
        self.first: Touch | None = None
        self.door = "first_touch"


_state = _State()


def record(touch: Touch) -> None:
    """Keep the record of the initialisation that was just done."""
    _state.first = touch


def first() -> Touch | None:
    """Return the record of the first initialisation; None if there was none while the doors were open."""
    return _state.first


def report_as(door: str) -> None:
    """Set the door that reports an initialisation where the owner is ``cpu``; in loader workers it is ``children``."""
    _state.door = door


def door() -> str:
    """Return the door that reports an initialisation where the owner is ``cpu``."""
    return _state.door


def describe() -> str:
    """Describe the first initialisation of CUDA, for a message."""
    first = _state.first
    if first is None:
        return (
            "before devguard's doors were opened, or by a library. To find the line, open the doors earlier "
            "(devguard.install)"
        )
    code, line, _, stack = first.origin
    if code is None:
        return f"by process {first.pid} at no line of user code; innermost: {Site.of(stack[0]) if stack else 'unknown'}"
    return f"by process {first.pid} at {Site(code.co_filename, line, code.co_name)}"
