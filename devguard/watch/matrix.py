"""The matrix of processes and GPUs: what the processes wrote (folder.py) joined with the driver's view (gpus.py)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from devguard.logs.reader import Merged, Process
from devguard.reporting.actions import LEFT_ALONE
from devguard.support import command_name
from devguard.watch.cells import FAULTS, Cell, Verdict, judge_cells, least_contexts
from devguard.watch.folder import ProcessLog
from devguard.watch.gpus import Gpu
from devguard.watch.neighbours import Neighbour, describe

__all__ = ["build", "Column", "find_columns", "Line", "Matrix", "name_of", "Row"]

UNLISTED = 8  # last characters of its UUID that name a GPU without a number


@dataclass(frozen=True)
class Column:
    """One GPU.

    Attributes
    ----------
    label, uuid, name : str
        As in `Gpu`.
    used, total : int or None
        Bytes; without the driver's view `used` is what the processes hold, and `total` is None.
    problem : str or None
        Why it cannot be read in full.
    """

    label: str
    uuid: str
    name: str = ""
    used: int | None = None
    total: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes
    ----------
    pid : int
        The process ID, on its own machine and in its own namespace.
    name : str
        Its role, rank or program.
    owner : str or None
        The devices that it owns; None if that is not known.
    mode : str or None
        The mode of its doors; None without devguard.
    guarded : bool
        Whether it has a log.
    running : bool
        Whether it still runs.
    cells : dict of str to Cell
        By UUID; a GPU on which it holds nothing is left out.
    strays : int
        The number of call sites that left something on a GPU that is not the owner's.
    """

    pid: int
    name: str
    owner: str | None
    mode: str | None
    guarded: bool
    running: bool
    cells: dict[str, Cell]
    strays: int = 0

    @property
    def has_fault(self) -> bool:
        """Whether it holds memory or a context where it should not."""
        return any(cell.verdict in FAULTS for cell in self.cells.values())


@dataclass(frozen=True)
class Line:
    """One call site of one process.

    Attributes
    ----------
    row : Row
        The process.
    site : Merged
        The strays there.
    """

    row: Row
    site: Merged


@dataclass(frozen=True)
class Matrix:
    """All processes on all GPUs at one moment.

    Attributes
    ----------
    time : float
        Seconds since 1970.
    columns : tuple of Column
        The GPUs.
    rows : tuple of Row
        The processes, in the order of their owners.
    lines : tuple of Line
        Their strays: those left alone first, then most bytes first.
    arenas : tuple of (Row, dict)
        What each arena holds, with its process.
    notes : tuple of str
        What cannot be seen, and why.
    """

    time: float
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    lines: tuple[Line, ...] = ()
    arenas: tuple[tuple[Row, dict[str, Any]], ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def has(self, verdict: Verdict) -> bool:
        """Return whether a cell has this verdict."""
        return any(cell.verdict == verdict for row in self.rows for cell in row.cells.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the matrix as plain data, fit for JSON."""
        return {
            "time": self.time,
            "gpus": [asdict(column) for column in self.columns],
            "processes": [asdict(row) for row in self.rows],
            "strays": [{"pid": line.row.pid, **line.site.as_dict()} for line in self.lines],
            "arenas": [{**arena, "pid": row.pid} for row, arena in self.arenas],
            "notes": list(self.notes),
        }


def build(
    journals: Iterable[ProcessLog],
    gpus: Sequence[Gpu] | None,
    *,
    keep_ended: bool = False,
    neighbour: Callable[[int], Neighbour] = describe,
    notes: Iterable[str] = (),
) -> Matrix:
    """Join what the processes say and what the driver says.

    Parameters
    ----------
    journals : iterable of ProcessLog
        The guarded processes.
    gpus : sequence of Gpu or None
        The driver's view; None if there is none.
    keep_ended : bool
        Whether processes that have ended are shown, as they were at their end.
    neighbour : callable
        Describes a process without a log.
    notes : iterable of str
        Added to the notes.
    """
    pids = {pid for gpu in gpus or () for pid in gpu.processes}
    alive = [journal for journal in journals if keep_ended or journal.is_running() or _is_leaving(journal, pids)]
    columns = find_columns(alive, gpus)
    least = least_contexts(alive, gpus or ())
    rows, lines, arenas = [], [], []
    for journal in alive:
        row = _row(journal, gpus or (), least)
        rows.append(row)
        lines += [Line(row, site) for site in journal.rows.values()]
        arenas += [(row, arena) for arena in journal.sample.arenas] if journal.sample else []
    known = {journal.pid for journal in alive if journal.pid is not None}
    family = ({journal.process.parent for journal in alive} | known) - {0}
    rows += _unguarded(gpus or (), known, family, neighbour)
    rows.sort(key=lambda row: _order(row, columns))
    lines.sort(key=lambda line: (line.site.action not in LEFT_ALONE, -line.site.bytes, -line.site.count))
    return Matrix(time.time(), tuple(columns), tuple(rows), tuple(lines), tuple(arenas), tuple(notes))


def _is_leaving(journal: ProcessLog, pids: set[int]) -> bool:
    """Return whether a process has written its last line, and the driver still counts it on a GPU."""
    pid = journal.pid
    return journal.process.ended and pid is not None and pid in pids and journal.is_process(pid)


def name_of(process: Process) -> str:
    """Return a short name for a guarded process: its role, its rank or its program."""
    if process.source and process.source.startswith("SGLang "):
        return process.source.removeprefix("SGLang ")
    program = command_name.shorten(process.command.split(" "))
    return program if process.rank is None else f"rank {process.rank} {program}"


def _row(log: ProcessLog, gpus: Sequence[Gpu], least: Mapping[str, int]) -> Row:
    process, state = log.process, log.state
    cells = judge_cells(log, state, log.sample, gpus, least)
    left = sum(site.action in LEFT_ALONE for site in log.rows.values())
    owner = ", ".join(sorted(state.owners)) or None
    return Row(process.pid, name_of(process), owner, process.mode, True, log.is_running(), cells, left)


def find_columns(journals: Sequence[ProcessLog], gpus: Sequence[Gpu] | None) -> list[Column]:
    """Return the GPUs in the order of their numbers, then those that only processes name, if they are on them."""
    used: dict[str, int] = {}
    numbers: dict[str, int] = {}
    held = set()
    for journal in journals:
        memory = journal.sample.memory if journal.sample is not None else {}
        for tag, uuid in journal.uuids((*journal.process.contexts, *memory)).items():
            reserved = memory.get(tag, (0, 0, 0))[1]
            used[uuid] = used.get(uuid, 0) + reserved
            if reserved or tag in journal.process.contexts:
                held.add(uuid)
            numbers[uuid] = max(numbers.get(uuid, 0), _number_of(tag))  # where few are visible, they are lower
    ordered = sorted(used, key=lambda uuid: (numbers[uuid], uuid))
    named = [uuid for uuid in ordered if not uuid.startswith("cuda:")]
    if gpus is not None:
        columns = [Column(gpu.label, gpu.uuid, gpu.name, gpu.used, gpu.total, gpu.problem) for gpu in gpus]
        others = held.difference(gpu.uuid for gpu in gpus)  # the driver has lost them, or names them otherwise
        columns += [Column(uuid[-UNLISTED:], uuid, used=used[uuid]) for uuid in named if uuid in others]
    else:
        columns = [Column(str(label), uuid, used=used[uuid]) for label, uuid in enumerate(named)]
    return columns + [Column(uuid, uuid, used=used[uuid]) for uuid in ordered if uuid.startswith("cuda:")]


@functools.lru_cache(maxsize=256)
def _number_of(tag: str) -> int:
    index = tag.removeprefix("cuda:")
    return int(index) if index.isdecimal() and len(index) < 4 else 0


def _unguarded(
    gpus: Sequence[Gpu], known: set[int], family: set[int], neighbour: Callable[[int], Neighbour]
) -> list[Row]:
    """Return the rows of processes that have no log."""
    cells: dict[int, dict[str, Cell]] = {}
    for gpu in gpus:
        for pid, nbytes in gpu.processes.items():
            if pid not in known:
                cells.setdefault(pid, {})[gpu.uuid] = Cell("?", nbytes, True)
    rows = []
    for pid, found in cells.items():
        other = neighbour(pid)
        verdict: Verdict = "?" if other.user == os.geteuid() or other.parent in family else "foreign"
        judged = {uuid: Cell(verdict, cell.bytes, cell.whole) for uuid, cell in found.items()}
        rows.append(Row(pid, other.name, None, None, False, True, judged))
    return rows


def _order(row: Row, columns: Sequence[Column]) -> tuple[Any, ...]:
    """Return the key by which rows are sorted: a healthy program is then a diagonal."""
    places = {column.uuid: place for place, column in enumerate(columns)}
    own = [places.get(uuid, 0) for uuid, cell in row.cells.items() if cell.verdict == "own"]
    anywhere = [places.get(uuid, 0) for uuid in row.cells]
    return not row.guarded, min(own or anywhere, default=-1), row.pid
