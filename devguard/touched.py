"""Who initialised CUDA first: one record per process, which several doors read.

The door ``first_touch`` writes it. The door ``children`` reads it in a forked child, where it tells what the parent
did, and takes over the answer for workers that own no GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from devguard.callsite import Origin, Site

__all__ = ["Touch", "describe"]


class Touch(NamedTuple):
    """The first initialisation of CUDA.

    Attributes
    ----------
    origin : Origin
        Where it was done.
    pid : int
        In which process.
    thread : str
        On which thread.
    time : float
        When, in seconds since the epoch.
    unowned : bool
        Whether no scope was entered and the process had no owner.
    module : str
        The name of the module of the user's code that did it; empty if there is none.
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


first: Touch | None = None

# the door that answers for CUDA being opened where the owner is cpu; loader workers have one of their own
door = "first_touch"


def describe() -> str:
    """Say who initialised CUDA, for a message."""
    if first is None:
        return (
            "before devguard's doors were opened, or by a library; open them earlier (devguard.install) to learn where"
        )
    code, line, _, stack = first.origin
    if code is None:
        return f"by process {first.pid} at no line of user code; innermost: {Site.of(stack[0]) if stack else 'unknown'}"
    return f"by process {first.pid} at {Site(code.co_filename, line, code.co_name)}"
