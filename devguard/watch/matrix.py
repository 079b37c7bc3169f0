"""The matrix of processes and GPUs, with a verdict for each cell.

A cell is judged by the owners that the process itself wrote; its bytes are the driver's where the driver names the
process, and those of torch's allocator elsewhere. A process without devguard is never called a stray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from devguard.logs.reader import Merged, Process
from devguard.reporting.actions import LEFT_ALONE
from devguard.support import command_name
from devguard.watch.folder import ProcessLog, Sample, State
from devguard.watch.gpus import Gpu
from devguard.watch.neighbours import Neighbour, describe

__all__ = ["build", "Cell", "Column", "FAULTS", "LEFT_ALONE", "Line", "Matrix", "name_of", "Row", "VERDICTS", "Verdict"]

Verdict = Literal["own", "STRAY", "ctx", "ipc", "allowed", "?", "foreign"]

# What each verdict means, for help, legends and docs.
VERDICTS: dict[Verdict, str] = {
    "own": "the process is on a GPU that it owns",
    "STRAY": "it holds memory on a GPU that it does not own",
    "ctx": "it holds a context there, and no memory of its own",
    "ipc": "it maps the memory of another process there, and holds none of its own",
    "allowed": "devguard.allow or unguarded permits it",
    "?": "its owner is not known: a process without devguard, or without an owner",
    "foreign": "a process of another user or job",
}
FAULTS: tuple[Verdict, ...] = ("STRAY", "ctx")
UNLISTED = 8  # last characters of its UUID that name a GPU without a number
CONTEXT_SLACK = 20 << 20  # bytes by which contexts of one driver differ


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
class Cell:
    """One process on one GPU.

    Attributes
    ----------
    verdict : str
        A key of `VERDICTS`.
    bytes : int or None
        What it holds there: with its context where the driver says so (`whole`), else what torch's allocator holds;
        None if neither is known.
    whole : bool
        Whether `bytes` is the driver's number.
    """

    verdict: Verdict
    bytes: int | None
    whole: bool


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
    now: float | None = None,
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
    now : float, optional
        The moment, in seconds since 1970; the present by default. For an earlier one each process is as it then was.
    keep_ended : bool
        Whether processes that have ended are shown, as they were at their end.
    neighbour : callable
        Describes a process without a log.
    notes : iterable of str
        Added to the notes.
    """
    moment = time.time() if now is None else now
    pids = {pid for gpu in gpus or () for pid in gpu.processes}
    alive = [journal for journal in journals if keep_ended or journal.is_running() or _is_leaving(journal, pids)]
    if now is not None:
        alive = [journal for journal in alive if journal.process.time <= now]
    columns = _columns(alive, gpus)
    least = _least_contexts(alive, gpus or ())
    rows, lines, arenas = [], [], []
    for journal in alive:
        row = _row(journal, gpus or (), now, least)
        rows.append(row)
        lines += [Line(row, site) for site in journal.rows.values()]
        sample = _sample_at(journal, now)
        arenas += [(row, arena) for arena in sample.arenas] if sample else []
    known = {journal.pid for journal in alive if journal.pid is not None}
    family = ({journal.process.parent for journal in alive} | known) - {0}
    rows += _unguarded(gpus or (), known, family, neighbour)
    rows.sort(key=lambda row: _order(row, columns))
    lines.sort(key=lambda line: (line.site.action not in LEFT_ALONE, -line.site.bytes, -line.site.count))
    return Matrix(moment, tuple(columns), tuple(rows), tuple(lines), tuple(arenas), tuple(notes))


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


def _state_at(journal: ProcessLog, now: float | None) -> State:
    process = journal.process
    if now is None or not journal.states:
        return State(0.0, process.owner, tuple(process.owned), tuple(process.contexts), tuple(process.allowed))
    past = [state for state in journal.states if state.time <= now]
    return past[-1] if past else State(0.0, None, (), (), ())


def _sample_at(journal: ProcessLog, now: float | None) -> Sample | None:
    if now is None:
        return journal.sample
    past = [sample for sample in journal.samples if sample.time <= now]
    return past[-1] if past else None


def _row(journal: ProcessLog, gpus: Sequence[Gpu], now: float | None, least: Mapping[str, int]) -> Row:
    process, state, sample = journal.process, _state_at(journal, now), _sample_at(journal, now)
    pid = journal.pid if now is None else None
    memory = sample.memory if sample else {}
    owned = set(state.owned) | ({state.owner} if state.owner else set())
    cells = {}
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    tags = {uuid: tag for tag, uuid in process.gpus.items()}
    tags.update({tag: tag for tag in {*state.contexts, *memory} - process.gpus.keys()})
    for uuid, tag in tags.items():
        gpu = by_uuid.get(uuid)
        is_listed = gpu is not None and pid in gpu.processes
        reserved = memory[tag][1] if tag in memory else None
        whole = gpu.processes[pid] if gpu is not None and pid is not None and is_listed else None
        if not (is_listed or tag in state.contexts or reserved):
            continue
        is_mapped = _maps(journal, tag) or (gpu is not None and pid in gpu.mapped)
        beyond = None if gpu is None or whole is None else whole - least.get(gpu.name, whole)
        verdict = _judge(tag, owned, state.allowed, reserved, beyond, is_mapped)
        cells[uuid] = Cell(verdict, reserved if whole is None else whole, whole is not None)
    left = sum(site.action in LEFT_ALONE for site in journal.rows.values())
    owner = ", ".join(sorted(owned)) or None
    return Row(process.pid, name_of(process), owner, process.mode, True, journal.is_running(), cells, left)


def _judge(
    tag: str,
    owned: set[str],
    allowed: Sequence[str],
    reserved: int | None,
    beyond: int | None,
    is_mapped: bool,
) -> Verdict:
    """Return the verdict on a GPU where a guarded process holds a context, or `beyond` one of its own."""
    if not owned:
        return "?"
    if tag in owned:
        return "own"
    if tag in allowed:
        return "allowed"
    if reserved or (beyond or 0) > CONTEXT_SLACK:
        return "STRAY"
    return "ipc" if is_mapped else "ctx"


def _maps(journal: ProcessLog, tag: str) -> bool:
    """Return whether the process has opened memory of another one on a device, by what the door ``ipc`` recorded."""
    return any(
        site.door == "ipc" and any(tag in devices.split(" -> ") for devices in site.devices)
        for site in journal.rows.values()
    )


def _least_contexts(journals: Iterable[ProcessLog], gpus: Sequence[Gpu]) -> dict[str, int]:
    """Return for each product the bytes of its smallest context: what a process holds beyond torch's allocator.

    Only guarded processes count, because the context of a program without torch is smaller.
    """
    found: dict[str, int] = {}
    by_pid = {journal.pid: journal for journal in journals}
    for gpu in gpus:
        for pid, whole in gpu.processes.items():
            journal = by_pid.get(pid)
            if whole is None or journal is None:
                continue
            tags = {uuid: tag for tag, uuid in journal.process.gpus.items()}
            sample = journal.sample
            reserved = sample.memory.get(tags.get(gpu.uuid, ""), (0, 0, 0))[1] if sample else 0
            context = max(whole - reserved, 0)
            found[gpu.name] = min(found.get(gpu.name, context), context)
    return found


def _columns(journals: Sequence[ProcessLog], gpus: Sequence[Gpu] | None) -> list[Column]:
    """Return the GPUs in the order of their numbers, then those that only processes name, if they are on them."""
    used: dict[str, int] = {}
    numbers: dict[str, int] = {}
    held = set()
    for journal in journals:
        memory = journal.sample.memory if journal.sample is not None else {}
        unnamed = {tag: tag for tag in {*journal.process.contexts, *memory} - journal.process.gpus.keys()}
        for tag, uuid in (journal.process.gpus | unnamed).items():
            reserved = memory.get(tag, (0, 0, 0))[1]
            used[uuid] = used.get(uuid, 0) + reserved
            if reserved or tag in journal.process.contexts:
                held.add(uuid)
            index = tag.removeprefix("cuda:")
            number = int(index) if index.isdecimal() and len(index) < 4 else 0
            numbers[uuid] = max(numbers.get(uuid, 0), number)  # where few are visible, the numbers are lower
    ordered = sorted(used, key=lambda uuid: (numbers[uuid], uuid))
    named = [uuid for uuid in ordered if not uuid.startswith("cuda:")]
    if gpus is not None:
        columns = [Column(gpu.label, gpu.uuid, gpu.name, gpu.used, gpu.total, gpu.problem) for gpu in gpus]
        others = held.difference(gpu.uuid for gpu in gpus)  # the driver has lost them, or names them otherwise
        columns += [Column(uuid[-UNLISTED:], uuid, used=used[uuid]) for uuid in named if uuid in others]
    else:
        columns = [Column(str(label), uuid, used=used[uuid]) for label, uuid in enumerate(named)]
    return columns + [Column(uuid, uuid, used=used[uuid]) for uuid in ordered if uuid.startswith("cuda:")]


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
