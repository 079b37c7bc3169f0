"""`no_strays`: a block in which no work may stray."""

from __future__ import annotations

from types import TracebackType

from devguard.doors import table
from devguard.errors import StrayDeviceError
from devguard.reporting.journal import Mark, journal

__all__ = ["no_strays"]


class no_strays:
    """A block at the end of which `StrayDeviceError` is raised if work strayed in it, repaired or not.

    A thread that was placed on the owner's device (action ``"placed"``) has not strayed.

    Raises
    ------
    StrayDeviceError
        At the end of the block; it names every call site. Not if the block raises another exception.

    Examples
    --------
    >>> with devguard.guard("cuda:1"), devguard.no_strays():
    ...     step()
    """

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[Mark] = []

    def __enter__(self) -> None:
        self._marks.append(journal.mark())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        mark = self._marks.pop()
        if error is not None:
            return
        table.inspect("at the end of no_strays()")
        found = [stray for stray in journal.since(mark) if stray.action != "placed"]
        dropped = journal.dropped_since(mark)
        if found or dropped:
            more = f"\n  and {dropped} more at call sites beyond the journal's limit" if dropped else ""
            total = sum(stray.count for stray in found) + dropped
            lines = "".join(f"\n  {stray}" for stray in found)
            raise StrayDeviceError(f"{total} stray(s) inside no_strays():{lines}{more}")
