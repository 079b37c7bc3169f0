"""One entry for each process, or for several that are alike and have no fault, so that many fit on a screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from devguard.watch.cells import Cell
from devguard.watch.matrix import Row

__all__ = ["Entry", "fold"]


class Entry(NamedTuple):
    """One line of the table: a process, or several that are alike.

    Attributes
    ----------
    rows : list of Row
        The processes.
    """

    rows: list[Row]

    @property
    def is_faulty(self) -> bool:
        return any(row.has_fault for row in self.rows)

    @property
    def name(self) -> str:
        return self.rows[0].name if len(self.rows) == 1 else f"{len(self.rows)} x {_common(self.rows)}"

    @property
    def pid(self) -> str:
        return str(self.rows[0].pid) if len(self.rows) == 1 else ""

    @property
    def owner(self) -> str:
        owners = {row.owner or ("-" if not row.guarded else "none") for row in self.rows}
        return owners.pop() if len(owners) == 1 else "their own"

    @property
    def mode(self) -> str:
        modes = {row.mode or "-" for row in self.rows}
        return modes.pop() if len(modes) == 1 else "several"

    @property
    def strays(self) -> int:
        return sum(row.strays for row in self.rows)

    def cell(self, uuid: str) -> Cell | None:
        found = [row.cells[uuid] for row in self.rows if uuid in row.cells]
        if not found:
            return None
        known = [cell.bytes for cell in found if cell.bytes is not None]
        return Cell(found[0].verdict, sum(known) if known else None, all(cell.whole for cell in found))


def _common(rows: Sequence[Row]) -> str:
    """Return what the names have in common, such as "scheduler TP*" for TP0 to TP3."""
    names = {row.name for row in rows}
    if len(names) > 1:
        names = {re.sub(r"[0-9]+", "*", name) for name in names}
    return names.pop() if len(names) == 1 else "processes"


def fold(rows: Sequence[Row], room: int) -> list[Entry]:
    """Return one entry for each process, or for alike processes without a fault, so that they fit if possible."""
    singles = [Entry([row]) for row in rows]
    if len(singles) <= room:
        return singles
    for by_gpu in (True, False):
        groups: dict[object, Entry] = {}
        for place, entry in enumerate(singles):
            (row,) = entry.rows
            verdicts = tuple(sorted((uuid if by_gpu else "", cell.verdict) for uuid, cell in row.cells.items()))
            alike = (row.mode, row.guarded, bool(row.cells), row.owner if by_gpu else "", verdicts)
            # By its place, because processes of several machines or containers may have the same process ID.
            key: object = place if entry.is_faulty or row.strays else alike
            groups.setdefault(key, Entry([])).rows.append(row)
        if len(groups) <= room:
            break
    return list(groups.values())
