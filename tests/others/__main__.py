"""``python -m tests.others [--only NAME] [--json]``: test suites of other projects, with and without devguard.

Each suite runs twice in a process that has imported torch: without devguard, and with ``DEVGUARD=repair``, an owner and
every door open from before the first test until after the last, also in spawned children. A suite is green if no test
has a worse outcome with devguard. It runs with the owner ``cpu`` and torch as installed, and with the owner ``cuda:1``
of two simulated GPUs, where devguard places threads. pip downloads all requirements into the user's cache folder.

CPython's own tests come from the package ``test`` of this Python. For tests that it lacks, ``DEVGUARD_OTHERS_STDLIB``
can name a folder that has them, such as ``Lib`` of CPython's sources of the same version.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from tests.helpers import simulated
from tests.others.suites import SUITES
from tests.others.verdict import Verdict, judge

OWNERS = ("cpu", "cuda:1") if simulated.POSSIBLE else ("cpu",)
SHOWN = 15  # Most tests of one kind that are printed.


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.others", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", action="append", choices=SUITES, help=f"of {', '.join(SUITES)}")
    parser.add_argument("--owner", metavar="DEVICE", action="append", choices=OWNERS, help=f"of {', '.join(OWNERS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--target", metavar="ID", action="append", default=[], help="only this test, class or file")
    arguments = parser.parse_args()
    if arguments.target and len(arguments.only or ()) != 1:
        parser.error("--target needs exactly one --only, the suite of the test")
    verdicts = []
    for name in arguments.only or SUITES:
        for owner in arguments.owner or OWNERS:
            print(f"others: {name}, owner {owner}", file=sys.stderr, flush=True)
            verdicts.append(judge(SUITES[name], owner, tuple(arguments.target)))
    if arguments.json:
        rows = [{**dataclasses.asdict(verdict), "green": verdict.green} for verdict in verdicts]
        print(json.dumps(rows, indent=2))
    else:
        show(verdicts)
    return 0 if all(verdict.green for verdict in verdicts) else 1


def show(verdicts: list[Verdict]) -> None:
    """Print the table, and the name of every test or guard that is not green."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="test suites of other projects: DEVGUARD=repair against no devguard")
    table.add_column("suite", no_wrap=True)
    table.add_column("owner")
    names = ("tests", "passed", "skipped", "fail anyway", "worse", "unsteady", "children", "records")
    for name in (*names, "s without", "s with"):
        table.add_column(name, justify="right")
    table.add_column("green")
    for row in verdicts:
        counts = row.counts
        figures = [sum(counts.values()), counts.get("passed", 0) + counts.get("xfailed", 0), counts.get("skipped", 0)]
        figures += [len(row.already), len(row.worse), len(row.unsteady), row.children, row.records]
        times = [f"{seconds:.0f}" for seconds in row.seconds]
        style = "" if row.green else "red"
        table.add_row(row.suite, row.owner, *map(str, figures), *times, "yes" if row.green else "NO", style=style)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for row in verdicts:
        notes = [f"guard: {text}" for text in row.guard]
        notes += [f"worse: {test}: {change}\n{row.details[test]}" for test, change in row.worse.items()]
        notes += [f"unsteady: {test}" for test in row.unsteady[:SHOWN]]
        notes += [
            f"fails without devguard, too: {test}: {outcome}" for test, outcome in list(row.already.items())[:SHOWN]
        ]
        if len(row.already) > SHOWN:
            notes.append(f"and {len(row.already) - SHOWN} more that fail without devguard, too (--json lists them)")
        for text in notes:
            console.print(f"{row.suite}, {row.owner}: {text}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
