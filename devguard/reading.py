"""Reading a folder of ``DEVGUARD_LOG``: the journals of many processes, merged per call site; for ``devguard log``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from devguard.errors import ConfigError
from devguard.logs import SUFFIX

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
    files = sorted(folder.glob(f"*{SUFFIX}"))
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
        newest: dict[int, dict[str, Any]] = {}  # a row is written again whenever it has grown
        for number, line in _lines(file):
            if line is None:
                damaged.append(f"{file.name}:{number}")
            elif "process" in line:
                about = line["process"]
                process.pid, process.host, process.command = about["pid"], about["host"], about["command"]
                process.rank = about.get("RANK")
            elif "end" in line:
                process.ended = True
                process.owner = line["end"]["process_owner"] or next(iter(line["end"]["owned"]), None)
                process.contexts = line["end"]["contexts"]
            elif "stray" in line:
                newest[line["stray"]] = line
        processes.append(process)
        for row in newest.values():
            _add(sites, row)
    return processes, sorted(sites.values(), key=lambda site: (-site.bytes, -site.count)), damaged


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        yield number, line if isinstance(line, dict) else None


def _add(sites: dict[tuple[Any, ...], Merged], row: dict[str, Any]) -> None:
    site = row["site"] or {"file": "", "line": 0, "function": ""}
    key = (row["door"], row["action"], site["file"], site["line"], site["function"])
    merged = sites.get(key)
    if merged is None:
        merged = sites[key] = Merged(*key, via=row["via"], note=row["note"])
    merged.count += row["count"]
    merged.bytes += row["bytes"]
    way = row["source"] if row["source"] == row["target"] else f"{row['source']} -> {row['target']}"
    if way not in merged.devices:
        merged.devices.append(way)
    if row["pid"] not in merged.processes:
        merged.processes.append(row["pid"])
