"""The page of ``devguard report``: one HTML file that needs nothing else, for one run or for two side by side."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from devguard._version import __version__
from devguard.watch.cells import VERDICTS
from devguard.watch.report import chart, layers, tables, unseen
from devguard.watch.report.markup import Html, element, join, moment, number, size, table
from devguard.watch.report.moments import CLASSES, Grid
from devguard.watch.report.run import Run
from devguard.watch.report.summary import Summary, count_of, summarize

__all__ = ["Limits", "MOST_BYTES", "render"]

MOST_BYTES = 300_000  # of the page


@dataclass(frozen=True)
class Limits:
    """How much of a run the page shows.

    Attributes
    ----------
    moments : int
        The positions of the slider, and the steps of the drawing.
    rows, columns : int
        The processes and the GPUs of the matrix.
    layers : int
        Of one kind on one GPU in the drawing.
    lines : int
        The rows of each other table.
    """

    moments: int = 160
    rows: int = 128
    columns: int = 32
    layers: int = 6
    lines: int = 100

    def smaller(self) -> Limits:
        """Return limits a third smaller: of moments, layers and lines, and of rows and columns once those are few."""
        few = {"moments": 24, "layers": 3, "lines": 24}
        if all(getattr(self, name) <= least for name, least in few.items()):
            few = {"moments": 8, "layers": 2, "lines": 8, "rows": 8, "columns": 8}
        found = {name: max(getattr(self, name) * 2 // 3, least) for name, least in few.items()}
        return dataclasses.replace(self, **found)


@dataclass(frozen=True)
class _Part:
    """One run on the page: its name in identifiers, its title, what is shown of it, and the most bytes on a GPU."""

    name: str
    title: str
    run: Run
    summary: Summary
    limits: Limits
    top: int


def render(runs: Sequence[tuple[str, Run]], limits: Limits | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    runs : sequence of (str, Run)
        One run, or two of them with titles such as ``"Before"`` and ``"After"``.
    limits : Limits, optional
        How much of them is shown; less if the page would be larger than `MOST_BYTES`.
    """
    allowed = limits or Limits()
    while True:
        page = _render(runs, allowed)
        smaller = allowed.smaller()
        if len(page.encode()) <= MOST_BYTES or smaller == allowed:
            return page
        allowed = smaller


def _render(runs: Sequence[tuple[str, Run]], limits: Limits) -> str:
    top = max((peak.bytes for _, run in runs for peak in run.history.peaks.values()), default=0)
    parts = [
        _Part(f"run-{place}", title, run, summarize(run), limits, top) for place, (title, run) in enumerate(runs, 1)
    ]
    style, script = _resource("style.css"), _resource("slider.js")
    sections: list[tuple[str, str, Callable[[_Part], Html]]] = [
        ("matrix", "Processes and GPUs", _show_matrix),
        ("memory", "Memory over time", _show_memory),
        ("strays", "Strays by line", lambda part: tables.list_sites(part.run, part.limits.lines)),
        ("contexts", "Contexts", lambda part: tables.list_contexts(part.run, part.limits.lines)),
        ("transport", "Transport", lambda part: tables.list_arenas(part.run, part.limits.lines)),
        ("processes", "Processes and environment", lambda part: tables.list_processes(part.run, part.limits.lines)),
        ("unseen", "What was not seen", _show_unseen),
    ]
    if not any(part.run.arenas or any(t.journal.process.transport for t in part.run.tracks) for part in parts):
        sections = [section for section in sections if section[0] != "transport"]
    links = [element("a", title, href=f"#{name}") for name, title, _ in sections]
    shown = [_section(name, title, parts, show) for name, title, show in sections]
    return Template(_resource("page.html")).substitute(
        policy="; ".join(
            (
                "default-src 'none'",
                f"style-src {_hash(style)}",
                f"script-src {_hash(script)}",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        title=element("title", "devguard report: ", ", ".join(part.run.folder.name for part in parts)),
        style=style,
        header=join([_head(part) for part in parts]),
        compared=_compare(parts) if len(parts) > 1 else "",
        links=join(links, " "),
        sections=join(shown),
        data=join(_data(part) for part in parts),
        script=script,
        made=join(["Made by devguard ", __version__, ", ", moment(time.time(), date=True), "."]),
    )


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _section(name: str, title: str, parts: Sequence[_Part], show: Callable[[_Part], Html]) -> Html:
    """Return one section, with a part for each run."""
    shown = [
        element("div", *([element("h3", part.title)] if len(parts) > 1 else []), show(part), class_="run")
        for part in parts
    ]
    return element("section", element("h2", title), element("div", *shown, class_="runs"), id=name)


def _head(part: _Part) -> Html:
    """Return the verdict on a run."""
    run, summary = part.run, part.summary
    mark, word = ("✓", "clean") if summary.is_clean else ("✗", "strays")
    verdict = element(
        "p", element("span", mark, aria_hidden="true"), " ", part.summary.verdict, class_=f"verdict {word}"
    )
    running = f" {summary.running:,} of {summary.processes:,} processes still ran." if summary.running else ""
    lasted = f", {run.history.last - run.history.first:.1f} s."
    when = [moment(run.history.first, date=True), " to ", moment(run.history.last), lasted, running]
    title = [element("h2", part.title)] if part.title else []
    return element("div", *title, verdict, element("p", element("code", run.folder), ", ", *when), class_="run")


def _compare(parts: Sequence[_Part]) -> Html:
    """Return the numbers of the runs side by side."""
    rows: list[list[object]] = [
        ["processes", *(number(part.summary.processes) for part in parts)],
        ["processes on GPUs of others", *(number(part.summary.misplaced_processes) for part in parts)],
        ["contexts there", *(number(part.summary.misplaced_contexts) for part in parts)],
        ["bytes there at the worst moment", *(size(part.summary.misplaced_bytes) for part in parts)],
        ["strays", *(number(part.summary.strays) for part in parts)],
        ["lines that strayed", *(number(part.summary.lines) for part in parts)],
    ]
    for action in dict.fromkeys(action for part in parts for action in part.summary.actions):
        rows.append([action, *(number(part.summary.actions.get(action, 0)) for part in parts)])
    labels = dict.fromkeys(column.label for part in parts for column in part.run.columns())
    for label in labels:
        row: list[object] = [f"most on GPU {label}"]
        for part in parts:
            peaks = part.run.history.peaks
            found = [
                peaks[each.uuid].bytes for each in part.run.columns() if each.label == label and each.uuid in peaks
            ]
            row.append(size(max(found)) if found and part.run.has_samples else "not known")
        rows.append(row)
    heads = ["", *(part.title for part in parts)]
    shown = table("The runs side by side", heads, rows, class_="compared")
    return element("section", element("h2", "Side by side"), shown, id="compared")


def _show_matrix(part: _Part) -> Html:
    """Return the matrix at the worst moment, the slider, and what the words mean."""
    run, limits = part.run, part.limits
    grid = Grid.of(run, limits.rows, limits.columns)
    if not grid.places:
        return element("p", "No process held anything on a GPU.")
    worst = run.history.worst.time
    times = run.history.moments(limits.moments)
    slider = element(
        "form",
        element("label", "Moment", for_=f"{part.name}-moment"),
        element("input", type="range", id=f"{part.name}-moment", min=0, max=len(times) - 1, step=1),
        element("button", f"The {grid.chosen}", type="button"),
        hidden=True,
    )
    shown = grid.table(worst, grid.label(worst, worst))
    notes = []
    if len(times) < run.history.count:
        notes = [
            f"The slider has {len(times):,} of {run.history.count:,} moments: of equal parts of the time the worst one."
        ]
    left = len(run.tracks) - len(grid.places)
    if left:
        more = count_of(left, "more process", "more processes")
        notes.append(f"Not shown: {more}, without memory on a GPU or to keep the page small.")
    columns = len(run.columns()) - len(grid.columns)
    if columns > 0:
        notes.append(f"Not shown: {count_of(columns, 'more GPU')}.")
    legend = element(
        "dl",
        *(
            element("div", element("dt", verdict, class_=CLASSES[verdict]), element("dd", meaning))
            for verdict, meaning in VERDICTS.items()
        ),
        class_="legend",
    )
    body = element("div", slider, shown, data_moments=f"{part.name}-moments")
    return join(
        [
            body,
            *(element("p", note) for note in notes),
            element("details", element("summary", "What the words mean"), legend),
        ]
    )


def _data(part: _Part) -> Html:
    """Return the data of the slider."""
    grid = Grid.of(part.run, part.limits.rows, part.limits.columns)
    if not grid.places:
        return Html("")
    history = part.run.history
    data = grid.data(history.moments(part.limits.moments), history.worst.time)
    return element("script", data, type="application/json", id=f"{part.name}-moments")


def _show_memory(part: _Part) -> Html:
    run, limits = part.run, part.limits
    if not run.has_samples:
        return element("p", "No process wrote how much memory it held: see what was not seen, below.")
    columns = run.columns()[: limits.columns]
    stacks = layers.stack(run, columns, limits.moments, limits.layers)
    history = run.history
    drawing = chart.draw(stacks, history.first, history.last, history.worst.time, part.top)
    shown = element("p", chart.MISSING) if drawing is None else element("div", drawing, class_="scroll")
    steps = max((len(one.times) for one in stacks), default=0)
    thinned = f"Drawn at {steps:,} of {history.count:,} moments: of equal parts of the time the one with most memory."
    note = element("p", thinned) if steps < history.count else ""
    return join([shown, note, tables.list_layers(run, stacks)])


def _show_unseen(part: _Part) -> Html:
    return element("ul", *(element("li", each) for each in unseen.describe(part.run)))
