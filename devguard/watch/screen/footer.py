"""What stands below the table: the lines of code that stray, arenas, and what cannot be seen."""

from __future__ import annotations

import os
import textwrap

from devguard.reporting.actions import LEFT_ALONE
from devguard.support.terminal import cut, format_size, list_some, printable
from devguard.watch.matrix import Line, Matrix
from devguard.watch.screen.spans import Span, cut_line

__all__ = ["draw_footer"]

MOST_LINES = 5  # of code


def draw_footer(matrix: Matrix, width: int, details: int | None = None) -> list[list[Span]]:
    """Return the lines below the table.

    Parameters
    ----------
    matrix : Matrix
        What to draw.
    width : int
        The columns of the terminal.
    details : int, optional
        The process for which all lines of code are listed, in place of the worst ones of all.
    """
    return _lines(matrix, width, details) + _unexplained(matrix, width) + _arenas(matrix, width) + _notes(matrix, width)


def _lines(matrix: Matrix, width: int, details: int | None) -> list[list[Span]]:
    """Return the worst lines of code over all processes, or all of one process."""
    chosen = [line for line in matrix.lines if details is None or line.row.pid == details]
    if details is None:
        chosen = [line for line in chosen if line.site.action in LEFT_ALONE]
    if not chosen:
        return [] if details is None else [[], [Span(f"pid {details} has recorded no stray")]]
    groups: dict[tuple[object, ...], list[Line]] = {}
    for line in chosen:
        site = line.site
        groups.setdefault((site.door, site.action, site.file, site.line, site.function), []).append(line)
    ordered = sorted(groups.values(), key=lambda group: -sum(line.site.bytes for line in group))
    most = MOST_LINES if details is None else len(ordered)
    title = "worst" if details is None else f"pid {details}"
    shown = [
        [Span(f"{title:8}" if not place else " " * 8, "bold"), *_describe(group)]
        for place, group in enumerate(ordered[:most])
    ]
    if len(ordered) > most:
        shown.append([Span(" " * 8), Span(f"and {len(ordered) - most} more: devguard log", "dim")])
    return [[], *(cut_line(line, width) for line in shown)]


def _describe(group: list[Line]) -> list[Span]:
    """Return one call site, in one process or several."""
    site = group[0].site
    where = f"{_short_path(site.file)}:{site.line} in {site.function}" if site.file else "no line of user code"
    devices = ", ".join(dict.fromkeys(each for line in group for each in line.site.devices[:2]))
    count, nbytes = sum(line.site.count for line in group), sum(line.site.bytes for line in group)
    style = "red" if site.action in LEFT_ALONE else ""
    names = list(dict.fromkeys(line.row.name for line in group))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        Span(printable(f"{format_size(nbytes):>9}  {count} x  {site.door}: {devices} [{site.action}]  "), style),
        Span(printable(where), "bold"),
        Span(printable(f"  ({names[0]}{more})")),
    ]


def _short_path(path: str) -> str:
    return os.sep.join(path.split(os.sep)[-2:])


def _unexplained(matrix: Matrix, width: int) -> list[list[Span]]:
    """Return a line for processes with a fault that no door has seen: the program names the GPU, or a library does."""
    seen = {line.row.pid for line in matrix.lines}
    rows = [row for row in matrix.rows if row.has_fault and row.pid not in seen]
    if not rows:
        return []
    pids = list_some([row.pid for row in rows], 3)
    text = f"no door saw how pid {pids} got there: the program or a library names that GPU"
    return [[], [Span(cut(text, width), "yellow")]]


def _arenas(matrix: Matrix, width: int) -> list[list[Span]]:
    shown = []
    for row, arena in matrix.arenas:
        numbers = {name: arena.get(name) for name in ("in_use", "budget", "peak", "waiting")}
        if not all(isinstance(number, int) for number in numbers.values()):
            continue
        in_use, budget, peak = (format_size(arena[name]) for name in ("in_use", "budget", "peak"))
        text = f"arena   {row.name}: in use {in_use} of {budget}, peak {peak}, {arena['waiting']} waiting"
        oldest = arena.get("oldest")
        if isinstance(oldest, dict):
            text += (
                f"; oldest {max(matrix.time - _number(oldest.get('put_at')), 0.0):.1f} s, put at {oldest.get('site')}"
            )
        shown.append([Span(cut(printable(text), width))])
    return [[], *shown] if shown else []


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _notes(matrix: Matrix, width: int) -> list[list[Span]]:
    """Return what cannot be seen, in full: the end of a note says what to do."""
    lines = [line for note in matrix.notes for line in textwrap.wrap(printable(note), max(width, 1))]
    return [[], *([Span(cut(line, width), "yellow")] for line in lines)] if lines else []
