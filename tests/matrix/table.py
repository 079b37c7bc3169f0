"""Run the cases, judge and count the results, and print the table.

A class is *detected* if in each of its cases mode observe records a stray with the marked line as call site. It is
*repaired* if in one case mode repair records a repair and leaves no context and no byte on a device that is not owned,
and *refused* if mode error raises in one case. It is *allowed* if in each case mode error accepts the work once
``devguard.allow`` names the modules. It has a *false stray* if the well-behaved twin of any case has a stray, and a
*false cell* if ``devguard watch`` would say STRAY of that twin, of the allowed work, or of a repaired case.

The door ``native`` finds contexts afterwards. It names the guarded call during which a context appeared, not the line
that opened it; such a class is counted as detected *around* the line.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from devguard import simgpu
from tests.helpers import simulated
from tests.matrix.harness import MODES, OWNER, Server

__all__ = ["cases", "count", "progress", "run", "show"]

HERE = Path(__file__).parent
CLASSES = 20  # As in the table of doors in README.md.
SERVERS = 2

WORDS = """
unguarded, repair: the devices on which the process opened a context, each with the most MiB that it held there.
detected: mode observe names the line of user code. "around": the door native names the guarded call during which the
    context appeared; `devguard run --trace-contexts` names the line itself.
repaired: mode repair records a repair, and no context and no byte is on a device that is not owned. CLOBBER: the
    library's own set_device opens the context on 0; the work after it is on the owner.
error: whether mode error raises before the harm. allowed: whether mode error accepts the same work without a record,
    once devguard.allow(..., modules=...) names the module of the line.
Device numbers are those of the machine (RANK-INDEX)."""


def cases() -> dict[str, str]:
    """Return the title of each case: the class, for some followed by the variant in parentheses."""
    found = sorted((HERE / "cases").glob("[!_]*.py"))
    return {path.stem: path.read_text().split('"""')[1].split(":")[0] for path in found}


def marked(case: str) -> tuple[str, int]:
    """Return the file and number of the line marked ``# STRAY``, in the case or in the library that it uses."""
    for path in (HERE / "cases" / f"{case}.py", *(HERE / "libraries").glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.endswith("# STRAY"):
                return path.name, number
    raise ValueError(f"no line of {case} is marked")


def run(
    chosen: Sequence[str],
    report: Callable[[int, int, str], None] = lambda *progress: None,
    modes: Sequence[str] = MODES,
) -> list[dict[str, Any]]:
    """Run cases; return one row for each.

    Parameters
    ----------
    chosen : sequence of str
        The names of the cases.
    report : callable, optional
        Called with the progress: the number of finished cells, the number of all cells, and the finished cell.
    modes : sequence of str, optional
        Some of the harness's modes; the rows have no results of the others.
    """
    pairs = list(itertools.product(chosen, modes))
    reports: dict[tuple[str, str], dict[str, Any]] = {}

    def work(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            environment = simulated.sim_environment(2, folder=folder)
            server = Server(environment)
            try:
                for pair in pairs[number::SERVERS]:
                    cell = server.run(*pair)
                    cell |= _held(environment["DEVGUARD_SIM_STATE"], cell["pids"])
                    reports[pair] = cell
                    report(len(reports), len(pairs), ", ".join(pair))
            finally:
                server.close()

    with ThreadPoolExecutor(SERVERS) as pool:
        list(pool.map(work, range(SERVERS)))
    return [judge(case, {mode: reports[case, mode] for mode in modes}) for case in chosen]


def _held(state: str, pids: list[int]) -> dict[str, Any]:
    """Return the devices on which some processes ever had a context, and the most bytes on each (by its number)."""
    processes = [process for process in simgpu.state(state) if process.pid in pids]
    devices = [device for process in processes for device in process.devices]
    contexts = sorted({device.index for device in devices if device.context})
    return {
        "contexts": contexts,
        "bytes": {str(index): sum(d.peak_bytes for d in devices if d.index == index) for index in contexts},
    }


def judge(case: str, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the row of one case, judged from the reports of the modes that it ran in."""
    file, line = marked(case)
    title = cases()[case]
    row: dict[str, Any] = {"class": title.partition(" ")[0], "case": title, "call_site": f"{file}:{line}"}
    if "unguarded" in reports:
        row["unguarded"] = {key: reports["unguarded"][key] for key in ("contexts", "bytes", "error")}
    if "observe" in reports:
        at_line = [stray for stray in reports["observe"]["strays"] if (stray["file"], stray["line"]) == (file, line)]
        row |= {"door": at_line[0]["door"] if at_line else None, "detected": bool(at_line)}
    if "repair" in reports:
        after = reports["repair"]
        elsewhere = set(after["contexts"]) - {OWNER, *after["opens"]}
        elsewhere |= {int(index) for index, held in after["bytes"].items() if held and index != str(OWNER)}
        acted = any(stray["action"] in ("repaired", "placed") for stray in after["strays"])
        row["repair"] = {key: after[key] for key in ("contexts", "bytes", "error")}
        row["repaired"] = acted and not elsewhere and after["repaired"] is not False and not after["error"]
    calm = ("behaves", "allowed", *(("repair",) if row.get("repaired") else ()))
    row["false_cells"] = [mode for mode in calm if "STRAY" in reports.get(mode, {}).get("verdicts", {}).values()]
    if "error" in reports:
        error = reports["error"]["error"] or ""
        row |= {"error": error.partition("\n")[0] or None, "refused": "StrayDeviceError" in error.partition(":")[0]}
    if "behaves" in reports:
        row["false_strays"] = [stray["door"] for stray in _strays(reports["behaves"])]
        row["behaves_error"] = reports["behaves"]["error"]
    if "allowed" in reports:
        strays, error = _strays(reports["allowed"]), reports["allowed"]["error"]
        row |= {"allowed": not strays and not error, "not_allowed": [error, strays]}
    return row


def _strays(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the strays of a report; a thread that was placed is none."""
    return [stray for stray in report["strays"] if stray["action"] != "placed"]


def count(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count classes (not cases), and false strays."""
    classes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    detected = [variants for variants in classes.values() if all(row.get("detected") for row in variants)]
    return {
        "classes": len(classes),
        "detected": len(detected),
        "around": sum(any(row["door"] == "native" for row in variants) for variants in detected),
        "repaired": sum(any(row.get("repaired") for row in variants) for variants in classes.values()),
        "refused": sum(any(row.get("refused") for row in variants) for variants in classes.values()),
        "allowed": sum(all(row.get("allowed") for row in variants) for variants in classes.values()),
        "false cells": sum(bool(row.get("false_cells")) for row in rows),
        "false strays": sum(bool(row.get("false_strays") or row.get("behaves_error")) for row in rows),
    }


def progress(done: int, total: int, cell: str) -> None:
    """Show the progress on standard error; on a terminal, in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total} {cell}", end="" if done < total else "\n", file=sys.stderr, flush=True)
    elif done % 10 == 0 or done == total:
        print(f"{done}/{total}", file=sys.stderr, flush=True)


def show(rows: list[dict[str, Any]], counts: dict[str, int]) -> None:
    """Print the table with rich, and the meaning of its words."""
    from rich.console import Console
    from rich.table import Table

    def held(cell: dict[str, Any]) -> str:
        return "  ".join(f"{index}: {cell['bytes'][str(index)] >> 20}" for index in cell["contexts"]) or "none"

    def word(value: bool) -> str:
        return "yes" if value else "no"

    def found(row: dict[str, Any]) -> str:
        return "around" if row["door"] == "native" else word(row["detected"])

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title="Every class of stray, live on 2 simulated GPUs; the owner is cuda:1", title_justify="left")
    for name in (
        "class",
        "door",
        "call site",
        "unguarded",
        "detected",
        "repair",
        "repaired",
        "error",
        "allowed",
        "false stray",
    ):
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            row["door"] or "-",
            row["call_site"],
            held(row["unguarded"]),
            found(row),
            held(row["repair"]),
            word(row["repaired"]),
            "raises" if row["refused"] else "no",
            word(row["allowed"]),
            ", ".join(row["false_strays"]) or row["behaves_error"] or "none",
        )
    console.print(table)
    console.print(
        f"{counts['classes']} of {CLASSES} classes ran. Detected: {counts['detected']} ({counts['around']} of them "
        f"around the line). Repaired: {counts['repaired']}. Refused in mode error: {counts['refused']}. "
        f"Accepted once allowed: {counts['allowed']}. "
        f"False strays in well-behaved programs: {counts['false strays']}.",
        soft_wrap=True,
    )
    console.print(WORDS, soft_wrap=True)
