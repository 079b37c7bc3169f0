"""``python -m tests.matrix [--json] [CASE ...]``: every class of stray in every mode, live, as a table.

Each cell is a separate process on simulated GPUs: the work unguarded, in the modes observe, repair and error, allowed,
and its well-behaved twin. The text under the table and table.py define "detected", "repaired" and the other words.
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.matrix import table


def main() -> int:
    """Run the named cases, or all; exit with 1 if a well-behaved program has a stray."""
    known = table.cases()
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(known))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}. Cases: {', '.join(known)}")
    rows = table.run(arguments.cases or list(known), table.progress)
    counts = table.count(rows)
    if arguments.json:
        print(json.dumps({"counts": counts, "rows": rows}, indent=2))
    else:
        table.show(rows, counts)
    return 1 if counts["false strays"] else 0


if __name__ == "__main__":
    sys.exit(main())
