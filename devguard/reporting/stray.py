"""The record of one stray, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from devguard.support.callsite import Site

__all__ = ["Action", "LEFT", "Stray"]

Action = Literal["observed", "warned", "repaired", "placed", "refused", "kept"]

# what a stray is called that a door leaves where it is
LEFT: dict[str, Action] = {"observe": "observed", "warn": "warned"}


@dataclass(frozen=True, slots=True)
class Stray:
    """Work that landed, or was about to land, on a device that is not the owner's; one record per call site.

    Attributes
    ----------
    door : str
        The way it came, such as ``"load"``.
    source : str
        The device that it named or was on, such as ``"cuda:0"``.
    target : str
        The device on which it is now. Equal to `source` unless the action is ``"repaired"`` or ``"placed"``.
    owner : str
        Who owns this scope: ``"cuda:1"`` or ``"cpu"``.
    action : str
        ``"repaired"``, ``"observed"``, ``"warned"``, ``"refused"`` (an error was raised instead), or ``"kept"``
        (left alone, because the program said so explicitly). ``"placed"`` is a thread, or a task of a pool, that was
        started on the owner's device: whether it would have strayed, nobody can know.
    count : int
        How often it happened at this call site.
    bytes : int
        Bytes of tensor data, summed over `count`.
    dtype : str or None
        The data type of the first one, where the door knows it.
    shape : tuple of int or None
        The shape of the first one, where the door knows it.
    pid, thread, rank : int, str, str or None
        Who did it first. `rank` is the launcher's ``RANK``.
    time : float
        When it happened first, in seconds since the epoch.
    site : Site or None
        The line of the user's code; None where the whole stack belongs to libraries.
    via : str or None
        The transport by which it came, such as ``"zmq"``.
    note : str or None
        What else the door knows, in words.
    stack : tuple of Site
        The innermost lines of the first one's stack, innermost first.
    """

    door: str
    source: str
    target: str
    owner: str
    action: Action
    count: int
    bytes: int
    dtype: str | None
    shape: tuple[int, ...] | None
    pid: int
    thread: str
    rank: str | None
    time: float
    site: Site | None
    via: str | None
    note: str | None
    stack: tuple[Site, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"at {self.site}" if self.site else "at no line of user code"
        via = f" (via {self.via})" if self.via else ""
        moved = f"{self.source} -> {self.target}" if self.source != self.target else self.source
        how = f"[owner {self.owner}, {self.action}] {self.count} x, {self.bytes} bytes"
        note = f"; {self.note}" if self.note else ""
        return f"{self.door}: {moved} {how}, {where}{via}{note}"
