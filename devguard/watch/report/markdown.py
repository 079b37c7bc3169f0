"""The report as Markdown, short enough for a comment on a pull request.

A log may hold anything, so nothing of it becomes a tag, a link, a mention or another cell of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from devguard.support.markdown import code_span, prose
from devguard.support.terminal import format_size
from devguard.watch.cells import FAULTS, Cell
from devguard.watch.report import unseen
from devguard.watch.report.moments import Grid
from devguard.watch.report.run import Run
from devguard.watch.report.summary import count_of, summarize

__all__ = ["render"]

MOST_ROWS = 32
MOST_COLUMNS = 16
MOST_LINES = 10
MOST_UNSEEN = 12


def render(runs: Sequence[tuple[str, Run]]) -> str:
    """Return the report on one run, or on two with their titles."""
    return "\n".join(line for title, run in runs for line in _render_one(title, run))


def _render_one(title: str, run: Run) -> Iterable[str]:
    summary = summarize(run)
    mark = "✓" if summary.is_clean else "✗"
    yield f"## {mark} {prose(title + ': ' if title else '')}GPUs of {code_span(run.folder.name)}"
    yield ""
    yield f"**{prose(summary.verdict)}**"
    yield ""
    yield from _matrix(run)
    yield from _sites(run)
    notes = unseen.describe(run)
    yield f"<details><summary>What was not seen: {len(notes)}</summary>"
    yield ""
    for note in notes[:MOST_UNSEEN]:
        yield f"- {prose(note)}"
    if len(notes) > MOST_UNSEEN:
        yield f"- {len(notes) - MOST_UNSEEN} more, which the page of `devguard report` has"
    yield ""
    yield "</details>"
    yield ""


def _matrix(run: Run) -> Iterable[str]:
    """Yield the matrix at the worst moment."""
    grid = Grid.of(run, MOST_ROWS, MOST_COLUMNS)
    if not grid.places:
        yield "No process held anything on a GPU."
        yield ""
        return
    worst = run.history.worst.time
    cells = grid.cells(worst)
    yield f"At {prose(grid.label(worst, worst))}:"
    yield ""
    heads = ["process", "pid", "owner", *(f"GPU {prose(column.label)}" for column in grid.columns)]
    yield from _table(
        heads,
        (
            [
                code_span(run.name(place)),
                str(run.tracks[place].journal.process.pid),
                prose(run.owner(place) or "not known"),
                *(_cell(cells.get((row, column))) for column in range(len(grid.columns))),
            ]
            for row, place in enumerate(grid.places)
        ),
    )
    yield from _left_out(len(run.tracks) - len(grid.places), "more process", "more processes")
    yield from _left_out(len(run.columns()) - len(grid.columns), "more GPU")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    held = "" if cell.bytes is None else f" {format_size(cell.bytes)}"
    return f"**{cell.verdict}{held}**" if cell.verdict in FAULTS else f"{prose(cell.verdict)}{held}"


def _sites(run: Run) -> Iterable[str]:
    """Yield the strays by line."""
    strays = run.strays
    if strays:
        yield from _table(
            ["bytes", "count", "door", "before, after", "action", "line", "write there"],
            (
                [
                    format_size(site.bytes),
                    f"{site.count:,}",
                    prose(site.door),
                    prose(", ".join(site.devices[:4])),
                    prose(site.action),
                    code_span(site.place) if site.file else "no line of user code",
                    prose(site.advice),
                ]
                for site in strays[:MOST_LINES]
            ),
        )
        yield from _left_out(len(strays) - MOST_LINES, "more line")


def _left_out(count: int, one: str, many: str = "") -> Iterable[str]:
    if count > 0:
        yield f"Not shown: {count_of(count, one, many)}."
        yield ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield _row(heads)
    yield _row(["---"] * len(heads))
    yield from map(_row, rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
