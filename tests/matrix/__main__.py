"""``python -m tests.matrix [--json] [CASE ...]``: every class of stray in every mode, live, as a table.

Each cell is a process of its own on simulated GPUs. A class is *detected* if mode observe records a stray whose call
site is the line marked in the case, *repaired* if mode repair records a repair and leaves no context and no byte on a
device that is not owned, *refused* if mode error raises, and has a *false stray* if its well-behaved twin records any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from devguard import simgpu
from tests import simulated
from tests.matrix.harness import MODES

HERE = Path(__file__).parent
OWNER = 1
CLASSES = {
    path.stem: path.read_text().split('"""')[1].split(":")[0]
    for path in sorted((HERE / "cases").glob("*.py"))
    if path.stem != "__init__"
}


def run(case: str, mode: str) -> dict[str, Any]:
    """Run one case in one mode; the harness's report, with the bytes that the process ever held on each device."""
    environment = simulated.sim_environment(2)
    command = [sys.executable, "-m", "tests.matrix.harness", case, mode]
    done = subprocess.run(command, env=environment, cwd=simulated.ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{case}, {mode}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    report: dict[str, Any] = json.loads(lines[-1])
    held = [process for process in simgpu.state(environment["DEVGUARD_SIM_STATE"]) if process.pid == report["pid"]]
    report["bytes"] = {device.index: device.peak_bytes for process in held for device in process.devices}
    return report


def marked(case: str) -> tuple[str, int]:
    """The file and the number of the line marked ``# STRAY``: in the case, or in the library that it uses."""
    for path in (HERE / "cases" / f"{case}.py", *(HERE / "libraries").glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.endswith("# STRAY"):
                return path.name, number
    raise ValueError(f"no line of {case} is marked")


def judge(case: str, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Say what was shown of one class. A thread that was placed is repaired, and has not strayed."""
    place = marked(case)
    observed = [row for row in reports["observe"]["strays"] if (row["file"], row["line"]) == place]
    repaired = [row for row in reports["repair"]["strays"] if row["action"] in ("repaired", "placed")]
    behaved, after = reports["behaves"]["strays"], reports["repair"]
    foreign = set(after["contexts"]) - {OWNER, *after["opens"]}
    clean = not foreign and not any(held for index, held in after["bytes"].items() if index != OWNER)
    return {
        "class": CLASSES[case],
        "door": observed[0]["door"] if observed else None,
        "unguarded": {key: reports["unguarded"][key] for key in ("contexts", "bytes")},
        "detected": bool(observed),
        "repair": {key: reports["repair"][key] for key in ("contexts", "bytes")},
        "repaired": bool(repaired) and clean and after["result"] is not False and not after["error"],
        "refused": (reports["error"]["error"] or "").startswith("StrayDeviceError"),
        "false_stray": bool(reports["behaves"]["error"]) or any(row["action"] != "placed" for row in behaved),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CLASSES)}")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CLASSES))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    chosen = arguments.cases or list(CLASSES)
    pairs = [(case, mode) for case in chosen for mode in MODES]
    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(pairs, pool.map(lambda pair: run(*pair), pairs), strict=True))
    rows = [judge(case, {mode: reports[case, mode] for mode in MODES}) for case in chosen]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table with rich."""
    from rich.console import Console
    from rich.table import Table

    def cell(held: dict[str, Any]) -> str:
        return " ".join(f"{index}:{held['bytes'].get(index, 0) >> 20}M" for index in held["contexts"]) or "none"

    def word(value: bool) -> str:
        return "yes" if value else "-"

    table = Table(title="every class of stray, live on 2 simulated GPUs; the owner is cuda:1 (context:MiB)")
    for name in ("class", "door", "unguarded", "detected", "with repair", "repaired", "refused", "false stray"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["class"],
            row["door"] or "-",
            cell(row["unguarded"]),
            word(row["detected"]),
            cell(row["repair"]),
            word(row["repaired"]),
            word(row["refused"]),
            "YES" if row["false_stray"] else "none",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name in ("detected", "repaired", "refused", "false_stray"):
        print(f"{name.replace('_', ' ')}: {sum(row[name] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    sys.exit(main())
