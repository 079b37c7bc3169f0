"""Print every ratio as a table: ``python -m benchmarks [--json]``.

Runs on two real GPUs if torch sees them, else on simulated ones (whose copies are copies in host memory). Each group
runs in a separate process, so that the owners of one group do not slow another. The budgets are those of the project's
design; a row is marked if it is over its budget beyond doubt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys

from benchmarks.measure import Row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the groups whose name contains TEXT")
    parser.add_argument("--group", metavar="NAME", help=argparse.SUPPRESS)  # Runs the group in this process.
    arguments = parser.parse_args()

    import torch

    from devguard import simgpu

    if torch.cuda.device_count() < 2:
        if simgpu.active():
            print("this torch sees no simulated GPUs", file=sys.stderr)
            return 1
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], simgpu.environment(2))

    from benchmarks import bookkeeping, cases, ipc, starting, threads, transport, watching

    groups = {**cases.GROUPS, "threads": threads.threads, "ipc": ipc.ipc, "bookkeeping": bookkeeping.bookkeeping}
    groups |= {"starting": starting.starting, "transport": transport.transport, "watching": watching.watching}
    if arguments.group:
        print(json.dumps([dataclasses.asdict(row) for row in groups[arguments.group]()]))
        return 0
    chosen = [name for name in groups if arguments.only in name]
    if not chosen:
        parser.error(f"no group's name contains {arguments.only!r}. Groups: {', '.join(groups)}")
    rows: list[Row] = []
    for number, name in enumerate(chosen, 1):
        print(f"benchmarks: {name} ({number} of {len(chosen)})", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks", "--group", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows += [Row(**row) for row in json.loads(done.stdout)]
    if arguments.json:
        gpus = "simulated" if simgpu.active() else torch.cuda.get_device_name(0)
        versions = {"torch": torch.__version__, "python": sys.version.split()[0], "gpus": gpus}
        report = {**versions, "rows": [{**dataclasses.asdict(row), "over": row.over} for row in rows]}
        print(json.dumps(report, indent=2))
    else:
        show(rows)
    return 0


def show(rows: list[Row]) -> None:
    """Print the rows with rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="devguard against torch's own ways (median of the rounds, and its 95% interval)")
    table.add_column("what")
    for name in ("figure", "from", "to", "budget", "baseline"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "red" if row.over else ""
        budget = "" if row.budget is None else f"{row.budget:.2f} {row.unit}"
        base = f"{row.base_us:,.2f} us" if row.base_us else ""
        figures = [f"{value:.3f} {row.unit}" for value in (row.ratio, row.low, row.high)]
        table.add_row(row.what, *figures, budget + (" over" if row.over else ""), base, style=style)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
