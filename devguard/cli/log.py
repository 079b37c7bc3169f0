"""``devguard log``: show the strays that the processes of a run recorded with ``DEVGUARD_LOG``, per call site."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from devguard.support.terminal import cut, format_size, printable, show, show_json, width

if TYPE_CHECKING:
    from devguard.reporting.log_reader import Merged, Process

__all__ = ["configure", "run"]

CONTEXT_DOORS = ("native", "first_touch", "children")  # They record contexts, which may have no line of user code.


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard log``."""
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the folder given to DEVGUARD_LOG or devguard run --log"
    )
    parser.add_argument("--json", action="store_true", help="print the merged records as JSON on standard output")
    parser.add_argument(
        "--processes",
        action="store_true",
        help="list all processes, with owner, contexts and end; by default, those that were killed or crashed",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the merged records of ``arguments.folder``.

    Returns
    -------
    int
        0, whether or not anything strayed; 1 if a file holds lines that cannot be read.
    """
    from devguard.reporting import log_reader

    processes, merged, damaged = log_reader.read(arguments.folder)
    if arguments.json:
        found = {
            "processes": [process.as_dict() for process in processes],
            "strays": [site.as_dict() for site in merged],
            "damaged": damaged,
        }
        show_json(found)
    else:
        _show(processes, merged, list_processes=arguments.processes)
        for place in damaged:
            show(f"cannot be read: {printable(place)}")
    return 1 if damaged else 0


def _show(processes: list[Process], merged: list[Merged], *, list_processes: bool) -> None:
    from devguard.reporting import process_end

    count, nbytes = sum(site.count for site in merged), sum(site.bytes for site in merged)
    show(f"{len(processes)} process(es), {count} stray(s) at {len(merged)} call site(s), {format_size(nbytes)}")
    for process in processes:
        for text in process.alerts:
            show(f"pid {process.pid}: {printable(text)}")
    for site in merged:
        where = f"{site.file}:{site.line} in {site.function}" if site.file else "no line of user code"
        via = f" (via {site.via})" if site.via else ""
        size, devices = format_size(site.bytes), _list(site.devices)
        show()
        show(printable(f"{size:>10}  {site.count} x  {site.door}: {devices} [{site.action}]"))
        show(printable(f"{'':10}  at {where}{via}"))
        if site.note:
            show(printable(f"{'':10}  {site.note}"))
        show(f"{'':10}  in pid {_list(site.processes)}")
    if any(not site.file and site.door in CONTEXT_DOORS for site in merged):
        show("\nA context has no line. To see the call that opens it, use devguard run --trace-contexts.")
    listed = processes if list_processes else [process for process in processes if process_end.has_died(process)]
    if listed:
        show()
        for process in listed:
            rank = f", rank {process.rank}" if process.rank else ""
            owner = process.owner or "no known device"
            contexts = _list(process.contexts) or "none"
            transport = f", transport {process.transport}" if process.transport else ""
            found = f"{process_end.describe(process)}; owned {owner}, contexts {contexts}{transport}"
            show(printable(f"pid {process.pid} on {process.host}{rank}: {found}"))
            show("    " + cut(printable(process.command), width() - 4))


def _list(values: Sequence[object], most: int = 8) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
