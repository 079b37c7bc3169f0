"""The cells of the matrix: what a process holds on a GPU, and the verdict on it.

A cell is judged by the owners that the process itself wrote; its bytes are the driver's where the driver names the
process, and those of torch's allocator elsewhere. A process without devguard is never called a stray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from devguard.watch.folder import ProcessLog, Sample, State
from devguard.watch.gpus import Gpu

__all__ = ["Cell", "FAULTS", "judge_cells", "least_contexts", "Verdict", "VERDICTS"]

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
CONTEXT_SLACK = 20 << 20  # bytes by which contexts of one driver differ


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


def judge_cells(
    log: ProcessLog,
    state: State,
    sample: Sample | None,
    gpus: Sequence[Gpu] = (),
    least: Mapping[str, int] | None = None,
) -> dict[str, Cell]:
    """Return what a guarded process holds, by the UUID of the GPU, with verdicts.

    Parameters
    ----------
    log : ProcessLog
        The process.
    state : State
        Its owners and contexts.
    sample : Sample or None
        Its memory.
    gpus : sequence of Gpu
        The driver's view.
    least : mapping of str to int, optional
        What `least_contexts` returns.
    """
    pid = log.pid
    memory = sample.memory if sample else {}
    cells = {}
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    tags = {uuid: tag for tag, uuid in log.uuids((*state.contexts, *memory)).items()}
    for uuid, tag in tags.items():
        gpu = by_uuid.get(uuid)
        is_listed = gpu is not None and pid in gpu.processes
        reserved = memory[tag][1] if tag in memory else None
        whole = gpu.processes[pid] if gpu is not None and pid is not None and is_listed else None
        if not (is_listed or tag in state.contexts or reserved):
            continue
        is_mapped = _maps(log, tag) or (gpu is not None and pid in gpu.mapped)
        beyond = None if gpu is None or whole is None else whole - (least or {}).get(gpu.name, whole)
        verdict = _judge(tag, state.owners, state.allowed, reserved, beyond, is_mapped)
        cells[uuid] = Cell(verdict, reserved if whole is None else whole, whole is not None)
    return cells


def _judge(
    tag: str,
    owned: Collection[str],
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


def _maps(log: ProcessLog, tag: str) -> bool:
    """Return whether the process has opened memory of another one on a device, by what the door ``ipc`` recorded."""
    return any(
        site.door == "ipc" and any(tag in devices.split(" -> ") for devices in site.devices)
        for site in log.rows.values()
    )


def least_contexts(logs: Iterable[ProcessLog], gpus: Sequence[Gpu]) -> dict[str, int]:
    """Return for each product the bytes of its smallest context: what a process holds beyond torch's allocator.

    Only guarded processes count, because the context of a program without torch is smaller.
    """
    found: dict[str, int] = {}
    by_pid = {log.pid: log for log in logs}
    for gpu in gpus:
        for pid, whole in gpu.processes.items():
            log = by_pid.get(pid)
            if whole is None or log is None:
                continue
            tags = {uuid: tag for tag, uuid in log.process.gpus.items()}
            sample = log.sample
            reserved = sample.memory.get(tags.get(gpu.uuid, ""), (0, 0, 0))[1] if sample else 0
            context = max(whole - reserved, 0)
            found[gpu.name] = min(found.get(gpu.name, context), context)
    return found
