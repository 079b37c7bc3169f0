"""Say on the terminal what the demonstration found: process x GPU, the strays, and what it means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import devguard

__all__ = ["clean", "contexts", "is_stray", "mebibytes", "show", "sites"]

MIB = 1 << 20
# A primary context on a data-centre GPU, before any kernel is loaded; simulated contexts take nothing.
CONTEXT_COST = "300 to 1000 MB"


def clean(result: dict[str, Any]) -> bool:
    """Tell whether the guarded pass left GPU 0 alone, with every answer right and every owner as meant."""
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
    )


def mebibytes(count: int) -> str:
    """Return bytes as MiB, without decimals that say nothing."""
    value = count / MIB
    return f"{value:.1f}" if 0 < value < 10 and count % MIB else f"{value:.0f}"


def contexts(count: int) -> str:
    """Return a number of contexts in words."""
    return f"{count} context{'' if count == 1 else 's'}"


def is_stray(process: dict[str, Any], device: dict[str, Any]) -> bool:
    """Tell whether a rank holds something on a GPU that it does not own."""
    return process["rank"] is not None and device["index"] != process["rank"]


def sites(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the strays of one pass, those of all ranks at one line of code together.

    Returns
    -------
    list of dict
        ``door``, ``action``, ``site`` (dict or None), ``code``, ``moves`` (like ``"cuda:0 -> cuda:1"``),
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
        Where to.
    """
    before, after, ranks = result["unguarded"], result["guarded"], result["ranks"]
    shape = sum(grid[0] * grid[1] * grid[2] for grid in (image["grid_thw"] for image in result["images"]))
    names = ", ".join(image["file"] for image in result["images"])
    console.print()
    console.print(
        f"One request ({escape(names)}: pixel_values float32 [{shape}, 1176], "
        f"{mebibytes(result['request_bytes'])} MiB) from a "
        f"tokenizer process on cuda:0 to {ranks} ranks, tensor-parallel, then data-parallel.",
        highlight=False,
    )
    console.print(
        f"{result['backend'].capitalize()} GPUs ({escape(result['reason'])}), torch {result['torch']}.\n",
        highlight=False,
    )
    tables = [
        _table("Before: unguarded", before, ranks),
        _table('After: @devguard.guard(argument="gpu_id")', after, ranks),
    ]
    console.print(Columns(tables, padding=(0, 3)))
    console.print(
        "● a CUDA context   MiB: peak memory   [bold red]![/] on a GPU that this rank does not own\n",
        highlight=False,
    )
    _show_sites(after, console)
    for title, run in (("before", before), ("after", after)):
        console.print(
            f"Ranks > 0 on GPU 0, {title}: {mebibytes(run['stray_bytes'])} MiB, {contexts(run['stray_contexts'])}; "
            f"{sum(answer['equal'] for answer in run['answers'])} of {2 * ranks} answers right.",
            highlight=False,
            style="red" if run["stray_bytes"] or run["stray_contexts"] or not run["values_equal"] else "green",
        )
    console.print("\n" + meaning(result), highlight=False, soft_wrap=False)


def meaning(result: dict[str, Any]) -> str:
    """Return what the figures mean, in plain words."""
    before, ranks = result["unguarded"], result["ranks"]
    if not before["stray_bytes"] and not before["stray_contexts"]:
        first = "Unguarded, nothing landed on GPU 0: this build of torch does not show the disease."
    else:
        cost = f" On real GPUs each context takes another {CONTEXT_COST}." if result["backend"] == "simulated" else ""
        first = (
            f"Unguarded, every request made {before['stray_contexts']} of {ranks} ranks copy its tensors to "
            "GPU 0, the "
            f"GPU of rank 0, because a pickled tensor carries its sender's device.{cost}"
        )
    if clean(result):
        return (
            f"{first} Guarded, each rank got the same tensors on its own GPU, with equal values, and GPU 0 "
            "was left alone."
        )
    return f"{first} Guarded, it did NOT come out clean: see the table, and run `devguard doctor`."


def _table(title: str, run: dict[str, Any], ranks: int) -> Table:
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
            text = f"{'● ' if device['context'] else ''}{mebibytes(device['peak_bytes'])} MiB"
            row.append(f"[bold red]{text} ![/]" if is_stray(process, device) else f"{text}  ")
        table.add_row(*row)
    return table


def _show_sites(run: dict[str, Any], console: Console) -> None:
    rows = sites(run)
    if not rows:
        console.print("The guard recorded no stray.\n")
        return
    table = Table(title="Strays that the guard met, by line of code", title_justify="left", title_style="bold")
    for column in ("line", "code"):
        table.add_column(column, overflow="fold")
    for column in ("what", "count", "MiB"):
        table.add_column(column, justify="right" if column != "what" else "left", no_wrap=True)
    for row in rows:
        site = row["site"]
        where = f"{_short(site['file'])}:{site['line']}\nin {site['function']}" if site else "no line of user code"
        moves = row["moves"] if len(row["moves"]) <= 3 else [*row["moves"][:2], f"... ({len(row['moves'])} GPUs)"]
        table.add_row(
            escape(where),
            escape(row["code"]),
            "\n".join([f"{row['door']}: {row['action']}", *moves]),
            str(row["count"]),
            mebibytes(row["bytes"]),
        )
    console.print(table)
    console.print()


def _short(file: str) -> str:
    """Return the shortest of a path's forms: from here, from where this package lies, or as it is."""
    home = Path(devguard.__file__).parents[1]
    forms = [file, os.path.relpath(file)]
    if Path(file).is_relative_to(home):
        forms.append(str(Path(file).relative_to(home)))
    return min(forms, key=len)
