"""``devguard log``: what the processes of a run recorded with ``DEVGUARD_LOG``, merged per call site."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devguard.reporting.log_reader import Merged, Process

__all__ = ["HELP", "configure", "run"]

HELP = "show the journals that DEVGUARD_LOG, or devguard run --log, collected: per call site, most bytes first"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder that DEVGUARD_LOG named")
    parser.add_argument("--json", action="store_true", help="print the merged records as JSON on standard output")
    parser.add_argument("--processes", action="store_true", help="list the processes too: their owners and their ends")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out.

    Returns
    -------
    int
        0, however much strayed: a journal is no verdict. 1 if a file holds lines that cannot be read.
    """
    from devguard.reporting import log_reader

    processes, merged, damaged = log_reader.read(arguments.folder)
    if arguments.json:
        found = {
            "processes": [vars(process) for process in processes],
            "strays": [site.as_dict() for site in merged],
            "damaged": damaged,
        }
        print(json.dumps(found, indent=2))
    else:
        _show(processes, merged, everybody=arguments.processes)
        for place in damaged:
            print(f"cannot be read: {place}")
    return 1 if damaged else 0


def _show(processes: list[Process], merged: list[Merged], *, everybody: bool) -> None:
    count, nbytes = sum(site.count for site in merged), sum(site.bytes for site in merged)
    print(f"{len(processes)} process(es), {count} stray(s) at {len(merged)} call site(s), {_size(nbytes)}")
    for site in merged:
        where = f"{site.file}:{site.line} in {site.function}" if site.file else "no line of user code"
        via = f" (via {site.via})" if site.via else ""
        print(f"\n{_size(site.bytes):>10}  {site.count} x  {site.door}: {', '.join(site.devices)} [{site.action}]")
        print(f"{'':10}  at {where}{via}")
        if site.note:
            print(f"{'':10}  {site.note}")
        print(f"{'':10}  in {_pids(site.processes)}")
    if everybody:
        print()
        for process in processes:
            rank = f", rank {process.rank}" if process.rank else ""
            owner = process.owner or "nothing that is known"
            contexts = ", ".join(process.contexts) or "none"
            end = f"owned {owner}, contexts {contexts}" if process.ended else "still running, or killed"
            print(f"pid {process.pid} on {process.host}{rank}: {end}\n    {process.command}")


def _pids(pids: list[int], most: int = 8) -> str:
    more = f" and {len(pids) - most} more" if len(pids) > most else ""
    return f"pid {', '.join(map(str, pids[:most]))}{more}"


def _size(nbytes: int) -> str:
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"
