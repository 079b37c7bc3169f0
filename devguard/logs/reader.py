"""The reader of a ``DEVGUARD_LOG`` folder: it merges the journals of many processes, for ``devguard log``.

Nothing that a file holds is taken on trust: a line with a value of another type, or out of range, is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from devguard.errors import ConfigError
from devguard.logs import process_end
from devguard.logs.lines import Damage, list_files, read_objects
from devguard.logs.process_end import ChildEnd, End
from devguard.logs.values import (
    MALFORMED,
    as_number,
    as_text,
    as_text_by_text,
    as_text_or_none,
    as_texts,
    as_time,
)
from devguard.reporting.log_file import SUFFIX

__all__ = ["Merged", "Process", "read", "read_line", "require_logs"]


@dataclass
class Process:
    """One process that wrote a log.

    Attributes
    ----------
    file : str
        The name of the file.
    pid : int
        The process ID.
    host, command : str
        The machine, and the command line.
    rank : str or None
        The launcher's ``RANK``.
    parent : int
        The process ID of its parent; 0 if it is not known.
    time : float
        When the file began, in seconds since 1970; 0.0 if it is not known.
    simulation : str or None
        The state file, if the process ran on simulated GPUs.
    owner : str or None
        The last owner that the process wrote; None if there was none.
    owned : list of str
        The devices that its scopes owned then.
    contexts : list of str
        The devices on which the process held a context then: at its end, if the end was orderly.
    allowed : list of str
        The devices that all or some of its modules might use.
    gpus : dict of str to str
        The UUID of each device that it saw; empty if CUDA was not initialised.
    mode : str or None
        The mode of its doors.
    source : str or None
        Where owner and mode came from; a role, such as ``"SGLang scheduler TP0"``, if an integration knew it.
    transport : str or None
        How an integration carried the tensors of its framework; None: as the framework sends them.
    alerts : list of str
        Why devguard does not guard the process, or not as the program asked.
    ended : bool
        Whether the process ended in an orderly way. False for a process that is still running.
    started, pid_space : int, str
        What tells the process from others with its pid; see process_identity.py.
    children : list of ChildEnd
        Its children that failed.
    end, signal, code, end_time : str, str or None, int or None, float or None
        How the process ended; see process_end.py, which also puts it in words.
    not_kept : int
        The strays for which its journal had no room, at the end.
    """

    file: str
    pid: int
    host: str = ""
    command: str = ""
    rank: str | None = None
    parent: int = 0
    time: float = 0.0
    simulation: str | None = None
    owner: str | None = None
    owned: list[str] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    gpus: dict[str, str] = field(default_factory=dict)
    mode: str | None = None
    source: str | None = None
    transport: str | None = None
    alerts: list[str] = field(default_factory=list)
    ended: bool = False
    started: int = 0
    pid_space: str = ""
    children: list[ChildEnd] = field(default_factory=list)
    end: End = "unknown"
    signal: str | None = None
    code: int | None = None
    end_time: float | None = None
    not_kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)


@dataclass
class Merged:
    """The strays at one call site, in all processes together.

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
    owners : list of str
        The owners, each once; empty for a log that does not name them.
    processes, ranks : list of int, list of str
        The pids, and the launcher's ranks of those that have one.
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
    owners: list[str] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    ranks: list[str] = field(default_factory=list)
    via: str | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, fit for JSON."""
        return asdict(self)


def read(
    folder: Path, is_selected: Callable[[Process], bool] = lambda process: True
) -> tuple[list[Process], list[Merged], list[str]]:
    """Read every journal in a folder.

    Parameters
    ----------
    folder : Path
        The folder that ``DEVGUARD_LOG`` named.
    is_selected : callable
        ``is_selected(process)`` returns whether the strays of a process are merged.

    Returns
    -------
    processes : list of Process
        The processes that wrote a file, also those that are not selected.
    merged : list of Merged
        One for each call site, door and action; most bytes first, then the highest count.
    damaged : list of str
        The lines that could not be read, as ``file:line``: the machine crashed, or another program wrote there.

    Raises
    ------
    ConfigError
        If the folder does not exist, or holds no journal.
    """
    names = require_logs(folder)
    processes: list[Process] = []
    sites: dict[tuple[Any, ...], list[Merged]] = {}
    damaged: list[str] = []
    for name in names:
        damage = Damage(name)
        process = Process(name, 0)
        newest: dict[int, Merged] = {}  # the last line of each row: a row is written again when it has grown
        for number, line in read_objects(folder / name, damage):
            try:
                read_line(line, process, newest)
            except MALFORMED:
                damage.add(number)
        if process.pid or newest:
            processes.append(process)
        for row in newest.values() if is_selected(process) else ():
            sites.setdefault((row.door, row.action, row.file, row.line, row.function), []).append(row)
        damaged += damage.places()
    process_end.settle(processes)
    merged = [_merge(rows) for rows in sites.values()]
    return processes, sorted(merged, key=lambda site: (-site.bytes, -site.count)), damaged


def require_logs(folder: Path, options: str = "") -> list[str]:
    """Return the names of the logs in a folder; raise ConfigError if there is none, or no such folder.

    The error names further `options` of ``devguard run``.
    """
    names = list_files(folder, SUFFIX)
    if not names:
        raise ConfigError(
            f"{folder} holds no log (*{SUFFIX}). Each guarded process writes one: run the program with "
            f"devguard run --log {folder}{options} -- ..."
        )
    return names


def read_line(line: dict[str, Any], process: Process, newest: dict[int, Merged]) -> None:
    """Add one line of a log to `process` or to the newest rows.

    Raises
    ------
    One of `MALFORMED`
        If the line is not as log_file.py writes it.
    """
    if "process" in line:
        first = line["process"]
        pid, host, command = as_number(first["pid"]), as_text(first["host"]), as_text(first["command"])
        process.rank = as_text_or_none(first.get("RANK"))
        process.parent, process.time = as_number(first.get("parent", 0)), as_time(first.get("time", 0.0))
        process.simulation = as_text_or_none(first.get("DEVGUARD_SIM_STATE"))
        process.started, process.pid_space = as_number(first.get("started", 0)), as_text(first.get("pid_space", ""))
        process.pid, process.host, process.command = pid, host, command
    elif "end" in line or "state" in line:
        state = line["end"] if "end" in line else line["state"]
        owned, contexts = as_texts(state["owned"]), as_texts(state["contexts"])
        transport = as_text_or_none(state.get("transport"))
        allowed, gpus = as_texts(state.get("allowed", [])), as_text_by_text(state.get("gpus", {}))
        mode, source = as_text_or_none(state.get("process_mode")), as_text_or_none(state.get("said_by"))
        process.not_kept = as_number(state.get("strays_not_kept", 0))
        process.owner = as_text_or_none(state["process_owner"]) or next(iter(owned), process.owner)
        process.owned, process.contexts, process.allowed, process.gpus = owned, contexts, allowed, gpus
        process.transport, process.mode, process.source = transport, mode, source
        process.ended = "end" in line
    elif "resumed" in line:  # the process had uninstalled devguard, and opened the doors again
        process.ended = False
    elif "child" in line:
        process.children.append(_child_end(line["child"], as_time(line["time"])))
    elif "alert" in line:
        process.alerts.append(as_text(line["alert"]))
    elif "stray" in line:
        newest[as_number(line["stray"])] = _call_site(line)


def _child_end(child: dict[str, Any], time: float) -> ChildEnd:
    signal, code = as_text_or_none(child.get("signal")), child.get("code")
    return ChildEnd(as_number(child["pid"]), signal, None if code is None else as_number(code), time)


def _call_site(row: dict[str, Any]) -> Merged:
    """Return the strays of one row of one process."""
    site = row["site"] or {"file": "", "line": 0, "function": ""}
    source, target = as_text(row["source"]), as_text(row["target"])
    return Merged(
        door=as_text(row["door"]),
        action=as_text(row["action"]),
        file=as_text(site["file"]),
        line=as_number(site["line"]),
        function=as_text(site["function"]),
        count=as_number(row["count"]),
        bytes=as_number(row["bytes"]),
        devices=[source if source == target else f"{source} -> {target}"],
        owners=_present(row.get("owner")),
        processes=[as_number(row["pid"])],
        ranks=_present(row.get("rank")),
        via=as_text_or_none(row["via"]),
        note=as_text_or_none(row["note"]),
    )


def _present(value: Any) -> list[str]:
    """Return a text as a list; an empty one for None."""
    return [] if value is None else [as_text(value)]


def _merge(rows: list[Merged]) -> Merged:
    """Return the strays of one call site as one, with the texts of its first row."""
    merged = rows[0]
    merged.count, merged.bytes = sum(row.count for row in rows), sum(row.bytes for row in rows)
    merged.devices = list(dict.fromkeys(devices for row in rows for devices in row.devices))
    merged.owners = list(dict.fromkeys(owner for row in rows for owner in row.owners))
    merged.processes = list(dict.fromkeys(pid for row in rows for pid in row.processes))
    merged.ranks = list(dict.fromkeys(rank for row in rows for rank in row.ranks))
    return merged
