"""The matrix of processes and GPUs at the moments of a run: one as a table, all as data for the slider."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devguard.support.terminal import printable
from devguard.watch.cells import VERDICTS, Cell
from devguard.watch.matrix import Column
from devguard.watch.report.markup import Html, element, moment, scroll, size
from devguard.watch.report.run import Run

__all__ = ["CLASSES", "Grid", "show_cell"]

# The verdicts -> their classes in the page's style sheet.
CLASSES = {verdict: {"STRAY": "stray", "?": "unknown"}.get(verdict, verdict) for verdict in VERDICTS}
HEADS = ("process", "pid", "owner", "mode")


@dataclass(frozen=True)
class Grid:
    """The rows and columns that the matrix has at all moments.

    Attributes
    ----------
    run : Run
        The run.
    places : list of int
        Its processes, in the order of the rows.
    columns : list of Column
        Its GPUs.
    """

    run: Run
    places: Sequence[int]
    columns: Sequence[Column]

    @classmethod
    def of(cls, run: Run, most_rows: int, most_columns: int) -> Grid:
        """Return the grid of the processes that ever held something on a GPU; those on GPUs of others stay longest."""
        held = {context.place for context in run.contexts}
        held |= {place for place, track in enumerate(run.tracks) if any(sample.memory for sample in track.samples)}
        astray = {place for place, _ in run.history.misplaced}
        order = [place for place in run.order() if place in held]
        kept = set(sorted(order, key=lambda place: place not in astray)[:most_rows])
        return cls(run, [place for place in order if place in kept], run.columns()[:most_columns])

    @property
    def chosen(self) -> str:
        """What the worst moment is called: in a run without a fault it is only the one with most memory."""
        return "worst moment" if self.run.history.misplaced else "moment with most memory"

    def cells(self, time: float) -> dict[tuple[int, int], Cell]:
        """Return what was held at a moment, by row and column."""
        at = {column.uuid: number for number, column in enumerate(self.columns)}
        return {
            (row, at[uuid]): cell
            for row, place in enumerate(self.places)
            for uuid, cell in self.run.tracks[place].cells(time).items()
            if uuid in at
        }

    def table(self, time: float, caption: object) -> Html:
        """Return the matrix at one moment."""
        cells = self.cells(time)
        heads = [*HEADS, *(f"GPU {each.label}" if each.label.isdecimal() else each.label for each in self.columns)]
        body = []
        for row, place in enumerate(self.places):
            process = self.run.tracks[place].journal.process
            first = element("th", self.run.name(place), scope="row")
            known = [process.pid, self.run.owner(place) or "not known", process.mode or "-"]
            shown = [show_cell(cells.get((row, column))) for column in range(len(self.columns))]
            body.append(element("tr", first, *(element("td", each) for each in known), *shown))
        totals = self._totals(time)
        foot = element(
            "tr",
            element("th", "all", scope="row", colspan=len(HEADS)),
            *(element("td", size(total)) for total in totals),
        )
        inner = element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *(element("th", head, scope="col") for head in heads))),
            element("tbody", *body),
            element("tfoot", foot),
            class_="matrix",
        )
        return scroll(inner, "Processes and GPUs")

    def _totals(self, time: float) -> list[int]:
        """Return what all processes hold on each GPU, also those that have no row."""
        held = dict.fromkeys((column.uuid for column in self.columns), 0)
        for track in self.run.tracks:
            for uuid, cell in track.cells(time).items():
                if uuid in held:
                    held[uuid] += cell.bytes or 0
        return list(held.values())

    def data(self, times: Sequence[float], worst: float) -> Html:
        """Return the matrix at some moments as JSON that is safe inside a ``script`` element: of each, what changed."""
        verdicts = list(VERDICTS)
        before: dict[tuple[int, int], Cell] = {}
        steps: list[dict[str, Any]] = []
        for time in times:
            now = self.cells(time)
            gone = [[row, column] for row, column in before.keys() - now.keys()]
            new = [
                [row, column, verdicts.index(cell.verdict), cell.bytes]
                for (row, column), cell in now.items()
                if before.get((row, column)) != cell
            ]
            steps.append({"label": self.label(time, worst), "set": sorted(gone) + new, "all": self._totals(time)})
            before = now
        found = {
            "verdicts": verdicts,
            "classes": [CLASSES[verdict] for verdict in verdicts],
            "columns": len(self.columns),
            "heads": len(HEADS),
            "worst": list(times).index(worst),
            "moments": steps,
        }
        written = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
        return Html(written)

    def label(self, time: float, worst: float) -> str:
        after = max(time - self.run.history.first, 0.0)
        return f"{_clock(time)}, {after:.1f} s after the start{f' (the {self.chosen})' if time == worst else ''}"


def show_cell(cell: Cell | None) -> Html:
    """Return one cell of the matrix."""
    if cell is None:
        return element("td", "-", class_="none")
    held = [] if cell.bytes is None else [" ", size(cell.bytes)]
    return element("td", element("b", cell.verdict), *held, class_=CLASSES[cell.verdict])


def _clock(time: float) -> str:
    return printable(moment(time).partition(">")[2].partition("<")[0])
