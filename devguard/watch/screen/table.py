"""The matrix as lines of text for a terminal of a given width; colours only repeat what the words say.

Where the rows do not fit, processes without a fault are counted together; where the columns do not fit, first the
numbers are shortened, then GPUs without a fault share a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from devguard.support.terminal import columns_of, cut, format_size, printable
from devguard.watch.cells import FAULTS, Cell
from devguard.watch.matrix import Column, Matrix, Row
from devguard.watch.screen.folding import Entry, fold
from devguard.watch.screen.footer import draw_footer
from devguard.watch.screen.spans import STYLES, Span, cut_line

__all__ = ["draw", "sparkline"]

BARS = "▁▂▃▄▅▆▇█"
GAP = 2
LONG_CELL = 15  # columns of a GPU with long numbers, about
LONGEST_NAME, SHORTEST_NAME = 28, 12


def sparkline(values: Sequence[int], total: int | None) -> str:
    """Return the values as bars; the highest bar is `total`, or the highest value where that is not known."""
    most = total or max(values, default=0)
    top = len(BARS) - 1
    return "".join(BARS[min(round(value * top / most), top)] for value in values) if most else ""


def draw(
    matrix: Matrix,
    width: int,
    *,
    height: int = 0,
    history: Mapping[str, Sequence[int]] | None = None,
    order: Callable[[Row], object] | None = None,
    chosen: int | None = None,
    details: bool = False,
) -> list[list[Span]]:
    """Return the lines of the screen.

    Parameters
    ----------
    matrix : Matrix
        What to draw.
    width : int
        The columns of the terminal.
    height : int
        Its lines, which the processes need not fill; 0: as many as there are.
    history : mapping of str to sequence of int, optional
        By the UUID of a GPU the bytes used at earlier moments, the oldest first.
    order : callable, optional
        The key by which the processes are sorted; by default a healthy program is a diagonal.
    chosen : int, optional
        The process that the cursor is on.
    details : bool
        Whether all lines of code of that process are listed, in place of the worst ones of all.
    """
    below = draw_footer(matrix, width, chosen if details else None)
    rows = sorted(matrix.rows, key=order) if order else list(matrix.rows)  # type: ignore[arg-type]
    room = height - len(below) - 4 if height else len(rows)
    entries = fold(rows, max(room, 4))
    table = _fit(entries, matrix.columns, width, history or {}, chosen)
    if not rows:
        table.append([Span(cut("no process is on a GPU, and none writes a log", width), "dim")])
    return [*table, *below]


def _fit(
    entries: Sequence[Entry],
    columns: Sequence[Column],
    width: int,
    history: Mapping[str, Sequence[int]],
    chosen: int | None,
) -> list[list[Span]]:
    """Return the table in the first layout that fits, or else in the narrowest one."""
    faulty = {column.uuid for column in columns if any(_is_fault(entry.cell(column.uuid)) for entry in entries)}
    healthy = [column for column in columns if column.uuid not in faulty]
    for short in (False, True) if len(columns) * LONG_CELL < width else (True,):
        for has_mode in (True, False):
            lines = _table(entries, columns, [], short, has_mode, history, chosen)
            if _width(lines) <= width:
                return lines
    for together in [*(healthy[-shared:] for shared in range(2, len(healthy) + 1)), columns]:
        apart = [column for column in columns if column not in together]
        lines = _table(entries, apart, together, True, False, history, chosen)
        if _width(lines) <= width:
            break
    return [cut_line(line, width) for line in lines]


def _is_fault(cell: Cell | None) -> bool:
    return cell is not None and cell.verdict in FAULTS


def _table(
    entries: Sequence[Entry],
    columns: Sequence[Column],
    together: Sequence[Column],
    short: bool,
    has_mode: bool,
    history: Mapping[str, Sequence[int]],
    chosen: int | None,
) -> list[list[Span]]:
    size = _short_size if short else format_size
    grid: list[list[Span]] = [
        [Span(""), Span(""), Span(""), *([Span("")] if has_mode else []), *(_title(column) for column in columns)],
        [Span(""), Span("used / total"), Span(""), *([Span("")] if has_mode else [])],
        [Span("pid", "bold"), Span("process", "bold"), Span("owner", "bold")],
    ]
    grid[1] += [Span(_usage(column, size)) for column in columns]
    if has_mode:
        grid[2].append(Span("mode", "bold"))
    bars = [sparkline(list(history.get(column.uuid, ()))[-(8 if short else 12) :], column.total) for column in columns]
    grid[2] += [Span(bar, "cyan") for bar in bars]
    if together:
        grid[0].append(Span("GPU " + _numbers([column.label for column in together]), "bold"))
        grid[1].append(Span("together"))
        grid[2].append(Span(""))
    for entry in entries:
        pids = [row.pid for row in entry.rows]
        line = [
            Span(("> " if chosen in pids else "") + entry.pid, "reverse" if chosen in pids else ""),
            Span(cut(printable(entry.name), LONGEST_NAME if columns else SHORTEST_NAME)),
            Span(entry.owner),
        ]
        line += [Span(entry.mode)] if has_mode else []
        line += [_show(entry.cell(column.uuid), size) for column in columns]
        if together:
            line.append(_show_all([(column, entry.cell(column.uuid)) for column in together], size))
        line.append(Span(f"! {entry.strays}" if entry.strays else "", "bold red"))
        grid.append(line)
    return _align(grid)


def _title(column: Column) -> Span:
    return Span(column.label if column.label.startswith("cuda:") else f"GPU {column.label}", "bold")


def _usage(column: Column, size: Callable[[int], str]) -> str:
    if column.used is None:
        return "unreadable" if column.problem else "-"
    slash = "/" if size is _short_size else " / "
    return size(column.used) + (f"{slash}{size(column.total)}" if column.total else "")


def _numbers(labels: Sequence[str]) -> str:
    """Return labels such as 1, 3, 4, 5 as "1,3-5"."""
    parts: list[list[str]] = []
    for label in labels:
        last = parts[-1][-1] if parts else ""
        if last.isdecimal() and label.isdecimal() and int(label) == int(last) + 1:
            parts[-1].append(label)
        else:
            parts.append([label])
    return ",".join(part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _show(cell: Cell | None, size: Callable[[int], str]) -> Span:
    if cell is None:
        return Span("-", "dim")
    held = "" if cell.bytes is None else f" {size(cell.bytes)}"
    return Span(cell.verdict + held, STYLES[cell.verdict])


def _show_all(cells: Sequence[tuple[Column, Cell | None]], size: Callable[[int], str]) -> Span:
    """Return the cells of several GPUs as one, faults first."""
    parts, styles = [], []
    for verdict, style in sorted(STYLES.items(), key=lambda item: item[0] not in FAULTS):
        there = [(column, cell) for column, cell in cells if cell is not None and cell.verdict == verdict]
        if there:
            held = sum(cell.bytes or 0 for _, cell in there)
            parts.append(f"{verdict} {size(held)} @{_numbers([column.label for column, _ in there])}")
            styles.append(style)
    return Span(", ".join(parts), styles[0]) if parts else Span("-", "dim")


def _short_size(nbytes: int) -> str:
    """Return a number of bytes in at most five characters, such as 57.1G."""
    number, unit = format_size(nbytes).split()
    value = float(number)
    return (f"{value:.0f}" if value >= 100 or unit == "B" else f"{value:.1f}") + unit[0]


def _align(grid: Sequence[Sequence[Span]]) -> list[list[Span]]:
    """Pad each column to its widest span."""
    widths: dict[int, int] = {}
    for line in grid:
        for place, span in enumerate(line):
            widths[place] = max(widths.get(place, 0), columns_of(span.text))
    lines = []
    for line in grid:
        spans = []
        for place, span in enumerate(line):
            spans.append(span)
            pad = widths[place] - columns_of(span.text) + GAP
            if place < len(line) - 1 and widths[place]:
                spans.append(Span(" " * pad))
        lines.append(spans)
    return lines


def _width(lines: Sequence[Sequence[Span]]) -> int:
    return max((columns_of("".join([span.text for span in line]).rstrip()) for line in lines), default=0)
