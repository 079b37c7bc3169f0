"""The verdict on a run in one line, and its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from devguard.reporting.actions import LEFT_ALONE
from devguard.support.terminal import format_size
from devguard.watch.report.run import Run

__all__ = ["as_dict", "count_of", "Summary", "summarize"]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run.

    Attributes
    ----------
    processes, running : int
        Those that wrote a log, and those of them that still run.
    misplaced_processes : int
        Those that were ever on a GPU that is not their own.
    misplaced_contexts : int
        On how many such GPUs, over all processes.
    misplaced_bytes : int or None
        What they held there at the worst moment; None if no process wrote how much memory it held.
    worst_moment : float
        The worst moment, in seconds since 1970.
    unknown_owners : int
        The processes that held something on a GPU, and had no known owner to the end.
    strays, stray_bytes, lines : int
        The strays, their bytes of tensor data, and the lines of code.
    actions : dict of str to int
        The strays by action.
    damaged : int
        The places of the logs that cannot be read.
    """

    processes: int
    running: int
    misplaced_processes: int
    misplaced_contexts: int
    misplaced_bytes: int | None
    worst_moment: float
    unknown_owners: int
    strays: int
    stray_bytes: int
    lines: int
    actions: dict[str, int]
    damaged: int

    @property
    def is_clean(self) -> bool:
        """Whether nothing was on a GPU of another process."""
        return not self.misplaced_contexts and not any(self.actions.get(name) for name in LEFT_ALONE)

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        if self.misplaced_contexts:
            found = count_of(self.misplaced_contexts, "context")
            bytes_there = f"up to {format_size(self.misplaced_bytes)} and " if self.misplaced_bytes else ""
            text = f"{self.misplaced_processes} of {count_of(self.processes, 'process', 'processes')} put "
            text += f"{bytes_there}{found} on GPUs that are not theirs"
        else:
            text = f"None of {count_of(self.processes, 'process', 'processes')} was seen on a GPU that is not its own"
        if self.strays:
            actions = ", ".join(f"{number:,} {action}" for action, number in self.actions.items())
            text += f"; {count_of(self.strays, 'stray')} at {count_of(self.lines, 'line')}: {actions}."
        else:
            text += "; no strays."
        return text


def count_of(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, in the singular or the plural."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def summarize(run: Run) -> Summary:
    """Return the numbers of a run."""
    actions: dict[str, int] = {}
    for site in sorted(run.strays, key=lambda site: (not site.is_left_alone, site.action)):
        actions[site.action] = actions.get(site.action, 0) + site.count
    return Summary(
        processes=len(run.tracks),
        running=sum(track.journal.is_running() for track in run.tracks),
        misplaced_processes=len({place for place, _ in run.history.misplaced}),
        misplaced_contexts=len(run.history.misplaced),
        misplaced_bytes=max(run.history.worst.bytes, 0) if run.has_samples else None,
        worst_moment=run.history.worst.time,
        unknown_owners=len(run.ownerless),
        strays=sum(site.count for site in run.strays),
        stray_bytes=sum(site.bytes for site in run.strays),
        lines=len({(site.file, site.line) if site.file else site.door for site in run.strays}),
        actions=actions,
        damaged=len(run.damaged),
    )


def as_dict(run: Run) -> dict[str, Any]:
    """Return the verdict line and the numbers of a run as plain data, fit for JSON."""
    summary, history = summarize(run), run.history
    peaks = [(column, history.peaks.get(column.uuid)) for column in run.columns()]
    return {
        "verdict": summary.verdict,
        "is_clean": summary.is_clean,
        **asdict(summary),
        "damaged": run.damaged,
        "gpus": [
            {"label": column.label, "uuid": column.uuid, "peak_bytes": peak.bytes, "peak_time": peak.time}
            for column, peak in peaks
            if peak is not None and run.has_samples
        ],
        "sites": [
            {name: value for name, value in asdict(site).items() if name not in ("quote", "advice")}
            for site in run.sites
        ],
    }
