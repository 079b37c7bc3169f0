"""Reading a folder of ``DEVGUARD_LOG``: the journals of many processes, merged per call site; for ``devguard log``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from devguard.errors import ConfigError
from devguard.reporting.log_file import SUFFIX

__all__ = ["Merged", "Process", "read"]


@dataclass
class Process:
    """One process that wrote a log.

    Attributes
    ----------
    file : str
        Its file.
    pid : int
        The process.
    host, command : str
        Where it ran, and what it was.
    rank : str or None
        The launcher's ``RANK``.
    owner : str or None
        Who owned it at its end; None if nobody did, or if it did not come to an orderly end.
    contexts : list of str
        The devices on which it held a context at its end.
    ended : bool
        Whether it came to an orderly end. One that is still running has not, either.
    """

    file: str
    pid: int
    host: str = ""
    command: str = ""
    rank: str | None = None
    owner: str | None = None
    contexts: list[str] = field(default_factory=list)
    ended: bool = False


@dataclass
class Merged:
    """What strayed at one call site, in all processes together.

    Attributes
    ----------
    door, action : str
        As in `devguard.Stray`.
    file, function : str
        The call site; empty if no line of user code was on the stack.
    line : int
        From 1; 0 if there is none.
    count, bytes : int
        Over all processes.
    devices : list of str
        ``"cuda:0 -> cuda:1"``, each once.
    processes : list of int
        The pids.
    via, note : str or None
        Of the first one.
    """

    door: str
    action: str
    file: str
    line: int
    function: str
    count: int = 0
    bytes: int = 0
    devices: list[str] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    via: str | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)


def read(folder: Path) -> tuple[list[Process], list[Merged], list[str]]:
    """Read every journal in a folder.

    Parameters
    ----------
    folder : Path
        What ``DEVGUARD_LOG`` named.

    Returns
    -------
    processes : list of Process
        Those that wrote a file.
    merged : list of Merged
        One for each call site, door and action; most bytes first, then most often.
    damaged : list of str
        The lines that could not be read, as ``file:line``: a machine went down, or another program wrote there.

    Raises
    ------
    ConfigError
        If there is no such folder, or no journal in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Name the one that DEVGUARD_LOG, or devguard run --log, named.")
    files = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.is_file())
    if not files:
        raise ConfigError(
            f"{folder} holds no journal (*{SUFFIX}). A process writes one there as soon as it is guarded: run the "
            f"program with devguard run --log {folder} -- ..."
        )
    processes: list[Process] = []
    sites: dict[tuple[Any, ...], Merged] = {}
    damaged: list[str] = []
    for file in files:
        process = Process(file.name, 0)
        newest: dict[int, Merged] = {}  # a row is written again whenever it has grown
        for number, text in _lines(file):
            try:
                _take(dict(json.loads(text)), process, newest)
            except (KeyError, TypeError, ValueError):  # not JSON, or not as logs.py writes it
                damaged.append(f"{file.name}:{number}")
        if process.pid or newest:
            processes.append(process)
        for row in newest.values():
            _add(sites, row)
    return processes, sorted(sites.values(), key=lambda site: (-site.bytes, -site.count)), damaged


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(errors="replace") as opened:
        for number, text in enumerate(opened, 1):
            if text.strip():
                yield number, text


def _take(line: dict[str, Any], process: Process, newest: dict[int, Merged]) -> None:
    if "process" in line:
        about = line["process"]
        process.pid, process.host, process.command = about["pid"], about["host"], about["command"]
        process.rank = about.get("RANK")
    elif "end" in line:
        end = line["end"]
        process.owner = end["process_owner"] or next(iter(end["owned"]), None)
        process.contexts = end["contexts"]
        process.ended = True
    elif "stray" in line:
        newest[line["stray"]] = _merged(line)


def _merged(row: dict[str, Any]) -> Merged:
    site = row["site"] or {"file": "", "line": 0, "function": ""}
    return Merged(
        door=row["door"],
        action=row["action"],
        file=site["file"],
        line=site["line"],
        function=site["function"],
        count=int(row["count"]),
        bytes=int(row["bytes"]),
        devices=[row["source"] if row["source"] == row["target"] else f"{row['source']} -> {row['target']}"],
        processes=[row["pid"]],
        via=row["via"],
        note=row["note"],
    )


def _add(sites: dict[tuple[Any, ...], Merged], row: Merged) -> None:
    merged = sites.setdefault((row.door, row.action, row.file, row.line, row.function), row)
    if merged is row:
        return
    merged.count += row.count
    merged.bytes += row.bytes
    merged.devices += [way for way in row.devices if way not in merged.devices]
    merged.processes += [pid for pid in row.processes if pid not in merged.processes]
