"""What a report does not show, and why: what no log can hold, and what the logs of this run do not."""

from __future__ import annotations

from collections.abc import Iterator

from devguard.logs import process_end
from devguard.support.terminal import format_size, list_some
from devguard.watch.report.run import DROPPED, FULL, Run
from devguard.watch.report.summary import count_of

__all__ = ["describe"]

MOST_NAMED = 8


def describe(run: Run) -> list[str]:
    """Return a sentence or two for each thing that was not seen, those of this run first."""
    return [*_logs(run), *_memory(run), *_ends(run), *_owners(run), *_always()]


def _logs(run: Run) -> Iterator[str]:
    """Yield what is missing in the logs themselves."""
    if run.damaged:
        yield f"{count_of(len(run.damaged), 'place')} of the logs cannot be read: {list_some(run.damaged, MOST_NAMED)}."
    alerts: dict[str, list[int]] = {}
    for track in run.tracks:
        for text in track.journal.process.alerts:
            alerts.setdefault(text, []).append(track.journal.process.pid)
    for text, pids in alerts.items():
        yield f"pid {list_some(pids, MOST_NAMED)}: {text}"
    for track, known in zip(run.tracks, run.environments, strict=True):
        if known.get(DROPPED, "0") != "0":
            pid = track.journal.process.pid
            yield f"pid {pid} strayed at more lines than its journal keeps: {known[DROPPED]} strays are not listed."
    processes = [track.journal.process for track in run.tracks]
    known_pids = {(process.host, process.pid) for process in processes}
    parents = {(process.host, process.parent) for process in processes if process.parent > 1} - known_pids
    if parents:
        silent = list_some(sorted(pid for _, pid in parents), MOST_NAMED)
        yield f"The parents of some processes wrote no log (pid {silent}): they run without devguard, or without torch."
    if len({process.host for process in processes}) > 1:
        yield "The processes ran on several machines, which have clocks of their own."


def _memory(run: Run) -> Iterator[str]:
    """Yield the memory that is not known."""
    blind = [place for place in sorted({each.place for each in run.contexts}) if not run.tracks[place].samples]
    if blind and not run.has_samples:
        yield (
            "No process wrote how much memory it held, because nothing watched. Run the program with devguard run "
            "--log DIR --record, or let devguard watch DIR run beside it."
        )
    elif blind:
        names = list_some([run.title(place) for place in blind], MOST_NAMED)
        yield f"These processes wrote no sample of their memory, so they are not in the drawing: {names}."
    for place, known in enumerate(run.environments):
        if FULL in known and len(run.tracks[place].samples) > 1:
            before = run.tracks[place].samples[-2].time
            yield (
                f"{run.title(place)} has written more samples than its log keeps, so only the newest one is known from "
                f"{before - run.history.first:,.0f} s after the start on."
            )
    for place, track in enumerate(run.tracks):
        for device, (_, _, peak) in (track.samples[-1].memory if track.samples else {}).items():
            most = max(sample.memory[device][1] for sample in track.samples if device in sample.memory)
            if peak > most:
                yield (
                    f"{run.title(place)} used up to {format_size(peak)} on {device} between two samples, which are a "
                    f"second apart; the samples show {format_size(most)} at most."
                )


def _ends(run: Run) -> Iterator[str]:
    """Yield the processes that did not end in an orderly way."""
    died = [track.journal.process for track in run.tracks if process_end.has_died(track.journal.process)]
    for process in died[:MOST_NAMED]:
        yield (
            f"pid {process.pid}: {process_end.describe(process)}. Its last second is not known; it counts as it last "
            "wrote until another process noted its end, or until the others of its time had ended."
        )
    if len(died) > MOST_NAMED:
        yield f"{len(died) - MOST_NAMED} more processes were killed or crashed."
    unknown = [track.journal.process.pid for track in run.tracks if track.journal.process.end == "unknown"]
    if unknown:
        yield f"Whether these processes still run cannot be seen from here: pid {list_some(unknown, MOST_NAMED)}."
    running = sum(track.journal.is_running() for track in run.tracks)
    if running:
        yield f"{count_of(running, 'process', 'processes')} still ran when this was made."


def _owners(run: Run) -> Iterator[str]:
    """Yield the processes without an owner."""
    if run.ownerless:
        names = list_some([run.title(place) for place in run.ownerless], MOST_NAMED)
        yield f"These processes had no known owner, so nothing of theirs counts as a stray: {names}."


def _always() -> Iterator[str]:
    """Yield what no log holds."""
    yield "Processes without devguard, or without torch, write no log. devguard watch shows them while they run."
    yield (
        "Bytes are those that torch's caching allocator holds. Contexts, NCCL, cuBLAS and other libraries hold more, "
        "which nvidia-smi counts."
    )
