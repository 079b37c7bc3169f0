"""The strays of a run by line of code: those of all processes together."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from devguard.logs.reader import Merged
from devguard.reporting import actions
from devguard.reporting.advice import advise
from devguard.watch import matrix
from devguard.watch.folder import ProcessLog
from devguard.watch.report.source_line import Quote, quote

__all__ = ["CallSite", "collect"]


@dataclass
class CallSite:
    """The strays of one door at one line, with one action.

    Attributes
    ----------
    door, action, file, line, function, via, note
        As in `devguard.logs.reader.Merged`.
    count, bytes : int
        Over all processes.
    devices : list of str
        Before and after, such as ``"cuda:0 -> cuda:1"``.
    owners : list of str
        What the processes own.
    processes : list of str
        Their names and process IDs.
    ranks : list of str
        The launcher's ranks of those that have one.
    modes : list of str
        The modes of the processes.
    first : float
        When the first one was, in seconds since 1970; 0.0 if that is not known.
    quote : Quote
        The line of code.
    advice : str
        What to write there.
    """

    door: str
    action: str
    file: str
    line: int
    function: str
    via: str | None = None
    note: str | None = None
    count: int = 0
    bytes: int = 0
    devices: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    ranks: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    first: float = 0.0
    quote: Quote = field(default_factory=Quote)
    advice: str = ""

    @property
    def is_stray(self) -> bool:
        """Whether it counts as a stray."""
        return actions.is_stray(self.action)

    @property
    def is_left_alone(self) -> bool:
        """Whether the work stayed on the GPU that is not the owner's."""
        return self.action in actions.LEFT_ALONE

    @property
    def place(self) -> str:
        """The line in words."""
        return f"{self.file}:{self.line} in {self.function}" if self.file else "no line of user code"

    def add(self, journal: ProcessLog, row: Merged, first: float) -> None:
        """Add what one process did there."""
        process = journal.process
        self.count, self.bytes = self.count + row.count, self.bytes + row.bytes
        self.via, self.note = self.via or row.via, self.note or row.note
        self.first = min(self.first or first, first or self.first)
        for known, new in (
            (self.devices, row.devices),
            (self.owners, row.owners),
            (self.processes, [f"{matrix.name_of(process)} (pid {process.pid})"]),
            (self.ranks, row.ranks),
            (self.modes, [process.mode] if process.mode else []),
        ):
            known += [each for each in new if each not in known]


def collect(journals: Sequence[ProcessLog]) -> list[CallSite]:
    """Return the strays of all processes: what was left alone first, then most bytes first; last what is no stray."""
    found: dict[tuple[str, str, str, int, str], CallSite] = {}
    for journal in journals:
        for number, row in journal.rows.items():
            key = row.door, row.action, row.file, row.line, row.function
            site = found.setdefault(key, CallSite(*key))
            site.add(journal, row, journal.times.get(number, 0.0))
    here = {journal.process.host for journal in journals} == {socket.gethostname()}
    for site in found.values():
        site.advice = advise(site.door, site.action)
        if here and site.file:
            site.quote = quote(site.file, site.line, site.first)
    return sorted(
        found.values(), key=lambda site: (not site.is_stray, not site.is_left_alone, -site.bytes, -site.count)
    )
