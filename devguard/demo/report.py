"""Print the result of the demonstration: two tables, process x GPU, the strays, and an explanation."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import devguard

__all__ = [
    "explain",
    "format_contexts",
    "format_mebibytes",
    "group_by_site",
    "is_clean",
    "is_stray",
    "show",
    "title_after",
    "total",
]

MIB = 1 << 20
# The size of a primary context on a data-centre GPU, before any kernel is loaded. Simulated contexts take nothing.
CONTEXT_COST = "300 to 1000 MB"


def is_clean(result: dict[str, Any]) -> bool:
    """Return whether nothing strayed to GPU 0 in the guarded pass, and all answers, owners and copies are right."""
    guarded = result["guarded"]
    return (
        guarded["stray_bytes"] == 0
        and guarded["stray_contexts"] == 0
        and bool(guarded["values_equal"])
        and all(
            process["owner"] == f"cuda:{process['rank']}"
            for process in guarded["processes"]
            if process["rank"] is not None
        )
        and _is_copied_once(result)
    )


def _is_copied_once(result: dict[str, Any]) -> bool:
    """Return whether the host transport moved each request down once, and up once a rank, where copies are counted."""
    costs = result["guarded"].get("costs")
    if result.get("transport") != "host" or costs is None or costs["copies"] is None:
        return True
    size, ranks = result["request_bytes"], result["ranks"]
    return bool(
        costs["copies"]
        == {
            "tensor-parallel": {"down": size, "up": ranks * size, "across": 0},
            "data-parallel": {"down": ranks * size, "up": ranks * size, "across": 0},
        }
    )


def title_after(result: dict[str, Any]) -> str:
    """Return the title of the guarded pass."""
    if result.get("transport") == "host":
        return "After: @devguard.guard, one copy in host memory"
    return 'After: @devguard.guard(argument="gpu_id")'


def total(costs: dict[str, Any], direction: str) -> int:
    """Return the bytes that were copied in one direction, in both ways together."""
    return sum(int(copies[direction]) for copies in costs["copies"].values())


def format_mebibytes(count: int) -> str:
    """Return a number of bytes in MiB as text, with one decimal only where it matters."""
    value = count / MIB
    return f"{value:.1f}" if 0 < value < 10 and count % MIB else f"{value:.0f}"


def format_contexts(count: int) -> str:
    """Return a number of contexts as text."""
    return f"{count} context{'' if count == 1 else 's'}"


def is_stray(process: dict[str, Any], device: dict[str, Any]) -> bool:
    """Return whether `process` is a rank that does not own `device`."""
    return process["rank"] is not None and device["index"] != process["rank"]


def group_by_site(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the strays of one pass, merged over all ranks by line of code.

    Returns
    -------
    list of dict
        ``door``, ``action``, ``site`` (dict or None), ``code``, ``moves`` (for example ``"cuda:0 -> cuda:1"``),
        ``count``, ``bytes``.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for process in run["processes"]:
        for stray in process["strays"]:
            site = stray["site"]
            key = (stray["door"], stray["action"], site and (site["file"], site["line"]))
            row = rows.setdefault(
                key,
                {
                    "door": stray["door"],
                    "action": stray["action"],
                    "site": site,
                    "code": stray["code"],
                    "moves": [],
                    "count": 0,
                    "bytes": 0,
                },
            )
            move = f"{stray['source']} -> {stray['target']}"
            if move not in row["moves"]:
                row["moves"].append(move)
            row["count"] += stray["count"]
            row["bytes"] += stray["bytes"]
    return list(rows.values())


def show(result: dict[str, Any], console: Console) -> None:
    """Print the whole report.

    Parameters
    ----------
    result : dict
        From `devguard.demo.launch.run_both`.
    console : Console
        The output.
    """
    before, after, ranks = result["unguarded"], result["guarded"], result["ranks"]
    patches = sum(math.prod(image["grid_thw"]) for image in result["images"])
    names = ", ".join(image["file"] for image in result["images"])
    console.print()
    console.print(
        f"One request ({escape(names)}: pixel_values float32 [{patches}, 1176], "
        f"{format_mebibytes(result['request_bytes'])} MiB) from a tokenizer process on cuda:0 to {ranks} ranks, "
        "tensor-parallel, then data-parallel.",
        highlight=False,
    )
    console.print(
        f"{result['backend'].capitalize()} GPUs ({escape(result['reason'])}), torch {result['torch']}.\n",
        highlight=False,
    )
    tables = [
        _make_table("Before: unguarded", before, ranks),
        _make_table(title_after(result), after, ranks),
    ]
    console.print(Columns(tables, padding=(0, 3)))
    console.print(
        "● a CUDA context   MiB: peak memory   [bold red]![/] on a GPU that this rank does not own\n",
        highlight=False,
    )
    _show_sites(after, console)
    if before.get("costs") and after.get("costs"):
        console.print(_make_costs_table(result))
        console.print()
    for title, run in (("before", before), ("after", after)):
        strays = f"{format_mebibytes(run['stray_bytes'])} MiB, {format_contexts(run['stray_contexts'])}"
        right = sum(answer["equal"] for answer in run["answers"])
        console.print(
            f"Ranks > 0 on GPU 0, {title}: {strays}; {right} of {2 * ranks} answers right.",
            highlight=False,
            style="red" if run["stray_bytes"] or run["stray_contexts"] or not run["values_equal"] else "green",
        )
    console.print("\n" + explain(result), highlight=False, soft_wrap=False)


def explain(result: dict[str, Any]) -> str:
    """Return an explanation of the figures."""
    before, ranks = result["unguarded"], result["ranks"]
    if not before["stray_bytes"] and not before["stray_contexts"]:
        first = "Unguarded, nothing strayed to GPU 0: this build of torch does not show the bug."
    else:
        cost = f" On real GPUs each context takes another {CONTEXT_COST}." if result["backend"] == "simulated" else ""
        first = (
            f"Unguarded, every request made {before['stray_contexts']} of {ranks} ranks copy its tensors to GPU 0, the "
            f"GPU of rank 0, because a pickled tensor carries its sender's device.{cost}"
        )
    if is_clean(result) and result.get("transport") == "host":
        return (
            f"{first} With the guard and devguard.transport, the tokenizer copies each request to the host once, each "
            "rank copies it from there to its own GPU, and the memory is free for the next request when all have read "
            "it. The values are equal, and nothing strayed to GPU 0."
        )
    if is_clean(result):
        return (
            f"{first} Guarded, each rank got the same tensors on its own GPU, with equal values, and nothing strayed "
            "to GPU 0."
        )
    return f"{first} The guarded pass was NOT clean: see the table, and run `devguard doctor`."


def _make_table(title: str, run: dict[str, Any], ranks: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("process", no_wrap=True)
    for index in range(ranks):
        table.add_column(f"GPU {index}", justify="right", no_wrap=True)
    for process in run["processes"]:
        cells = {device["index"]: device for device in process["devices"]}
        row = [process["name"]]
        for index in range(ranks):
            device = cells.get(index)
            if device is None or not (device["context"] or device["peak_bytes"]):
                row.append("")
                continue
            text = f"{'● ' if device['context'] else ''}{format_mebibytes(device['peak_bytes'])} MiB"
            row.append(f"[bold red]{text} ![/]" if is_stray(process, device) else f"{text}  ")
        table.add_row(*row)
    return table


def _make_costs_table(result: dict[str, Any]) -> Table:
    """Return the costs of both passes, side by side."""
    size = max(1, result["request_bytes"])
    table = Table(title="What sending the request costs", title_justify="left", title_style="bold")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for name in ("unguarded", "guarded"):
        table.add_column("before" if name == "unguarded" else "after", justify="right", no_wrap=True)
        costs = result[name]["costs"]
        for way, copies in (costs["copies"] or {}).items():
            for direction, text in (("down", "GPU to host"), ("up", "host to GPU")):
                count = copies[direction] / size
                rows.setdefault(f"{way}: copies {text}", []).append(f"{count:g} x {format_mebibytes(size)} MiB")
        rows.setdefault("GPU 0, all processes, peak", []).append(f"{format_mebibytes(costs['gpu_0_peak'])} MiB")
        rows.setdefault("CUDA contexts, all GPUs", []).append(str(costs["contexts"]))
        rows.setdefault("host memory, peak while sending", []).append(f"{format_mebibytes(costs['host_peak'])} MiB")
        rows.setdefault("/dev/shm, peak while sending", []).append(f"{format_mebibytes(costs['shm_peak'])} MiB")
    for text, cells in rows.items():
        table.add_row(text, *cells)
    return table


def _show_sites(run: dict[str, Any], console: Console) -> None:
    rows = group_by_site(run)
    if not rows:
        console.print("The guard recorded no stray.\n")
        return
    table = Table(title="Strays that the guard recorded, by line of code", title_justify="left", title_style="bold")
    for column in ("line", "code"):
        table.add_column(column, overflow="fold")
    for column in ("what", "count", "MiB"):
        table.add_column(column, justify="right" if column != "what" else "left", no_wrap=True)
    for row in rows:
        site = row["site"]
        where = f"{_shorten(site['file'])}:{site['line']}\nin {site['function']}" if site else "no line of user code"
        moves = row["moves"] if len(row["moves"]) <= 3 else [*row["moves"][:2], f"... ({len(row['moves'])} GPUs)"]
        table.add_row(
            escape(where),
            escape(row["code"]),
            "\n".join([f"{row['door']}: {row['action']}", *moves]),
            str(row["count"]),
            format_mebibytes(row["bytes"]),
        )
    console.print(table)
    console.print()


def _shorten(file: str) -> str:
    """Return the shortest form of a path: unchanged, or relative to this directory or to the package's parent."""
    home = Path(devguard.__file__).parents[1]
    forms = [file, os.path.relpath(file)]
    if Path(file).is_relative_to(home):
        forms.append(str(Path(file).relative_to(home)))
    return min(forms, key=len)
