"""A log as text for a terminal: each call site, the processes, and the result of the gate with its lines last."""

from __future__ import annotations

from collections.abc import Iterator

from devguard.logs import process_end
from devguard.logs.gate import Gate
from devguard.logs.reader import Merged, Process
from devguard.logs.summary import Summary, count
from devguard.support.terminal import cut, format_size, list_some, printable, width

__all__ = ["format_text"]

CONTEXT_DOORS = ("native", "first_touch", "children")  # They record contexts, which may have no line of user code.
MOST_PER_LINE = 8


def format_text(summary: Summary, *, list_processes: bool = False) -> Iterator[str]:
    """Yield the lines; with `list_processes` those of all processes, not only of those that died."""
    strays = summary.strays
    total, nbytes = sum(site.count for site in strays), sum(site.bytes for site in strays)
    size = format_size(nbytes)
    yield f"{len(summary.processes)} process(es), {total} stray(s) at {len(strays)} call site(s), {size}"
    if summary.others:
        yield f"not counted as strays: {summary.count_others()} at {len(summary.others)} call site(s)"
    for pid, text in summary.alerts:
        yield f"pid {pid}: {printable(text)}"
    has_baseline = summary.gate is not None and summary.gate.baseline is not None
    shown = summary.gate.failing if summary.gate is not None and has_baseline else [*strays, *summary.others]
    for site in shown:
        yield from _format_site(site)
    if any(not site.file and site.door in CONTEXT_DOORS for site in shown):
        yield "\nA context has no line. To see the call that opens it, use devguard run --trace-contexts."
    listed = summary.processes if list_processes else summary.died
    if listed:
        yield ""
    for process in listed:
        yield from _format_process(process)
    for place in summary.damaged:
        yield f"cannot be read: {printable(place)}"
    if summary.gate is not None:
        yield ""
        yield from _format_gate(summary, summary.gate)


def _format_site(site: Merged) -> Iterator[str]:
    where = f"{site.file}:{site.line} in {site.function}" if site.file else "no line of user code"
    via = f" (via {site.via})" if site.via else ""
    yield ""
    yield printable(f"{format_size(site.bytes):>10}  {_head(site)} [{site.action}]")
    yield printable(f"{'':10}  at {where}{via}")
    if site.note:
        yield printable(f"{'':10}  {site.note}")
    yield f"{'':10}  in pid {list_some(site.processes, MOST_PER_LINE)}"


def _head(site: Merged) -> str:
    return f"{site.count} x  {site.door}: {list_some(site.devices, MOST_PER_LINE)}"


def _format_process(process: Process) -> Iterator[str]:
    rank = f", rank {process.rank}" if process.rank else ""
    owner = process.owner or "no known device"
    contexts = list_some(process.contexts, MOST_PER_LINE) or "none"
    transport = f", transport {process.transport}" if process.transport else ""
    found = f"{process_end.describe(process)}; owned {owner}, contexts {contexts}{transport}"
    yield printable(f"pid {process.pid} on {process.host}{rank}: {found}")
    yield "    " + cut(printable(process.command), width() - 4)


def _format_gate(summary: Summary, gate: Gate) -> Iterator[str]:
    fail_on = f"(fails on: {', '.join(gate.fail_on)})"
    known = f", besides {count(len(gate.known), 'known one')} in {gate.baseline}" if gate.baseline else ""
    new = "new call site" if gate.baseline else "call site"
    if gate.failing:
        yield printable(f"fails: {count(len(gate.failing), new)} with strays{known} {fail_on}")
    else:
        yield printable(f"passes: no {new} with strays{known} {fail_on}")
    for site in gate.failing:
        devices = list_some(site.devices, MOST_PER_LINE)
        yield printable(f"  {summary.place(site)}: {site.door}: {devices} [{site.action}] {site.count} x")
    for entry, left in gate.vanished:
        some = f" ({left} of {count(len(entry.lines), 'line')} left)" if left else ""
        yield printable(f"vanished{some}: {entry}")
