"""A log as Markdown for a comment on a pull request: a verdict, a table of lines, and what else a reviewer needs.

A log may hold anything, so all that it holds stands in code spans, in which Markdown reads neither HTML nor mentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from devguard.logs import process_end
from devguard.logs.gate import Gate
from devguard.logs.reader import Merged
from devguard.logs.summary import Summary, count
from devguard.support.markdown import code_span as _code
from devguard.support.terminal import cut, format_size, printable

__all__ = ["format_markdown"]

MOST_ROWS = 40  # of each table or list: a comment on GitHub has room for 65,536 characters
MOST_COLUMNS = 200  # of one text
HEAD = ("| size | count | what | line | where |", "| ---: | ---: | --- | --- | --- |")


def format_markdown(summary: Summary) -> Iterator[str]:
    """Yield the lines."""
    gate = summary.gate
    yield f"### devguard: {_verdict(summary, gate)}"
    yield ""
    total = sum(site.count for site in summary.strays)
    size = format_size(sum(site.bytes for site in summary.strays))
    sites = count(len(summary.strays), "call site")
    yield f"{count(len(summary.processes), 'process', 'processes')}, {count(total, 'stray')} at {sites}, {size}."
    if gate is not None:
        yield f"Fails on {', '.join(gate.fail_on)}{_name_baseline(gate)}."
    if gate is None or gate.baseline is None:
        yield from _table(summary, summary.strays)
    else:
        yield from _table(summary, gate.failing)
        yield from _list("Vanished from the baseline's strays", [_code(entry) for entry, _ in gate.vanished])
    if summary.others and (gate is None or gate.baseline is None):
        yield ""
        yield f"<details><summary>Not counted as strays: {_plain(summary.count_others())}</summary>"
        yield from _table(summary, summary.others)
        yield ""
        yield "</details>"
    deaths = [
        f"pid {process.pid}{_rank(process.rank)}: {_code(process_end.describe(process))}, owned "
        f"{_code(process.owner or 'no known device')}, contexts {_code(', '.join(process.contexts) or 'none')}"
        for process in summary.died
    ]
    yield from _list("Processes that died", deaths)
    yield from _list(
        "Not guarded as asked, or not recorded", [f"pid {pid}: {_code(text)}" for pid, text in summary.alerts]
    )
    yield from _list("Cannot be read", [_code(place) for place in summary.damaged])


def _verdict(summary: Summary, gate: Gate | None) -> str:
    if gate is None:
        return count(len(summary.strays), "line") + " with strays" if summary.strays else "no strays"
    if not gate.failing:
        return "passes"
    new = "new " if gate.baseline else ""
    return f"fails, {count(len(gate.failing), f'{new}line')} with strays"


def _name_baseline(gate: Gate) -> str:
    if gate.baseline is None:
        return ""
    return f" that are not among the {count(len(gate.known), 'known call site')} of {_code(gate.baseline)}"


def _table(summary: Summary, sites: Sequence[Merged]) -> Iterator[str]:
    if not sites:
        return
    yield ""
    yield from HEAD
    for site in sites[:MOST_ROWS]:
        what = f"{_code(f'{site.door}: ' + ', '.join(site.devices))} {_code(site.action)}"
        more = " ".join(_code(text) for text in (site.via and f"via {site.via}", site.note) if text)
        where = f"ranks {', '.join(site.ranks)}" if site.ranks else f"pids {', '.join(map(str, site.processes))}"
        line = f"{_code(summary.place(site))} {more}".rstrip()
        yield f"| {format_size(site.bytes)} | {site.count} | {what} | {line} | {_code(where)} |"
    if len(sites) > MOST_ROWS:
        yield f"| | | and {count(len(sites) - MOST_ROWS, 'more line')} | | |"


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if not items:
        return
    yield ""
    yield f"{title}:"
    yield ""
    yield from (f"- {item}" for item in items[:MOST_ROWS])
    if len(items) > MOST_ROWS:
        yield f"- and {len(items) - MOST_ROWS} more"


def _rank(rank: str | None) -> str:
    return "" if rank is None else f" (rank {_code(rank)})"


def _plain(text: str) -> str:
    """Return the words of a text, without any sign that Markdown or HTML might read."""
    return re.sub(r"[^\w ,]", "?", cut(printable(text), MOST_COLUMNS))
