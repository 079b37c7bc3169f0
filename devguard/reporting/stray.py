"""One occurrence of a stray, as a door detects it, and the record of all occurrences at one call site."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Literal, NamedTuple

from devguard.support.callsite import Origin, Site

__all__ = ["Action", "LEFT", "Occurrence", "Stray"]

Action = Literal["observed", "warned", "repaired", "placed", "refused", "kept"]

# The action of a door that leaves a stray where it is, by mode.
LEFT: dict[str, Action] = {"observe": "observed", "warn": "warned"}


class Occurrence(NamedTuple):
    """One occurrence of a stray, with all that the door knows. It may hold a frame, so it is never kept.

    Attributes
    ----------
    door, source, owner : str
        As in `Stray`.
    nbytes : int
        Bytes of tensor data; 0 where there are none, or where the number is unknown.
    start : frame or None
        The frame from which the call site is searched outwards; unused where `origin` is given.
    dtype, shape, note : optional
        As in `Stray`.
    origin : Origin or None
        The call site, if the stray was caused earlier.
    """

    door: str
    source: str
    owner: str
    nbytes: int = 0
    start: FrameType | None = None
    dtype: str | None = None
    shape: Any = None
    note: str | None = None
    origin: Origin | None = None

    @property
    def what(self) -> str:
        """What strayed, in words."""
        return f"{self.nbytes} bytes" if self.nbytes else "work"


@dataclass(frozen=True, slots=True)
class Stray:
    """Work that landed, or was about to land, on a device that is not the owner's; one record per call site.

    Attributes
    ----------
    door : str
        The door, such as ``"load"``.
    source : str
        The device that the work named or was on, such as ``"cuda:0"``.
    target : str
        The device on which the work is now. Equal to `source` unless the action is ``"repaired"`` or ``"placed"``.
    owner : str
        The owner of the scope: ``"cuda:1"`` or ``"cpu"``.
    action : str
        What became of the work: ``"repaired"``, ``"refused"``, ``"observed"`` or ``"warned"``; or ``"placed"`` or
        ``"kept"``, which are no strays. docs/log.md and ``devguard log --help`` explain each of them.
    count : int
        The number of strays at this call site.
    bytes : int
        Bytes of tensor data, summed over `count`.
    dtype : str or None
        The data type of the first one, where the door knows it.
    shape : tuple of int or None
        The shape of the first one, where the door knows it.
    pid, thread, rank : int, str, str or None
        The process, the thread and the launcher's ``RANK`` of the first one.
    time : float
        When the first one happened, in seconds since the epoch.
    site : Site or None
        The line of the user's code; None where the whole stack belongs to libraries.
    via : str or None
        The transport that carried it, such as ``"zmq"``.
    note : str or None
        Further details from the door, in words.
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

    @property
    def devices_used(self) -> list[str]:
        """The devices, away from the owner's, on which this stray may have put something."""
        if self.action in ("repaired", "placed") or (self.action == "refused" and self.door != "set_device"):
            return []
        return self.source.split(",")

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"at {self.site}" if self.site else "at no line of user code"
        via = f" (via {self.via})" if self.via else ""
        devices = f"{self.source} -> {self.target}" if self.source != self.target else self.source
        counts = f"[owner {self.owner}, {self.action}] {self.count} x, {self.bytes} bytes"
        note = f"; {self.note}" if self.note else ""
        return f"{self.door}: {devices} {counts}, {where}{via}{note}"
