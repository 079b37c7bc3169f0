"""One run, as its log folder shows it: all that a report says of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from devguard.logs import process_end
from devguard.logs.lines import Damage, read_objects
from devguard.logs.reader import Process, require_logs
from devguard.reporting.log_file import MOST_SAMPLED
from devguard.watch import matrix
from devguard.watch.folder import ProcessLog
from devguard.watch.matrix import Column
from devguard.watch.report import arenas, contexts, sites
from devguard.watch.report.arenas import ArenaUse
from devguard.watch.report.contexts import Context
from devguard.watch.report.ends import find_ends
from devguard.watch.report.history import History
from devguard.watch.report.sites import CallSite
from devguard.watch.report.track import Track

__all__ = ["DROPPED", "FULL", "MOST_MOMENTS", "read", "Run", "VARIABLES"]

MOST_MOMENTS = 160
VARIABLES = ("devguard", "torch", "python", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK")  # of the first line of a log
DROPPED = "strays_not_kept"  # of the last line
FULL = "full"  # whether a log has all the samples that it keeps


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    folder : Path
        Its log folder.
    history : History
        What its processes held over time; ``history.tracks`` are the processes.
    sites : list of CallSite
        Its strays by line, and what is no stray after them.
    contexts : list of Context
        Its contexts.
    arenas : list of ArenaUse
        Its arenas of `devguard.transport`.
    environments : list of dict of str to str
        For each process the versions and variables that its log names.
    damaged : list of str
        The lines that cannot be read, as ``file:line``.
    """

    folder: Path
    history: History
    sites: list[CallSite]
    contexts: list[Context]
    arenas: list[ArenaUse]
    environments: list[dict[str, str]]
    damaged: list[str]

    @property
    def tracks(self) -> list[Track]:
        """The processes."""
        return self.history.tracks

    @property
    def strays(self) -> list[CallSite]:
        """The lines that strayed."""
        return [site for site in self.sites if site.is_stray]

    @property
    def has_samples(self) -> bool:
        """Whether any process wrote how much memory it held."""
        return any(track.samples for track in self.tracks)

    @property
    def ownerless(self) -> list[int]:
        """The places of the processes that had a context, and no known owner to the end."""
        places = sorted({context.place for context in self.contexts})
        return [place for place in places if not any(one.owner or one.owned for one in self.tracks[place].states)]

    def name(self, place: int) -> str:
        """Return the name of a process."""
        return matrix.name_of(self.tracks[place].journal.process)

    def owner(self, place: int) -> str:
        """Return the devices that a process owned last; empty if that is not known."""
        return ", ".join(sorted(self.tracks[place].journal.state.owners))

    def title(self, place: int) -> str:
        """Return the name of a process with its process ID."""
        return f"{self.name(place)} (pid {self.tracks[place].journal.process.pid})"

    def columns(self) -> list[Column]:
        """Return the GPUs on which a process held something; all of them if none did."""
        used = {uuid for uuid, peak in self.history.peaks.items()} | {context.uuid for context in self.contexts}
        return [column for column in self.history.columns if column.uuid in used or not used]

    def order(self) -> list[int]:
        """Return the places of the processes in the order of their GPUs: a healthy program is then a diagonal."""
        places = {column.uuid: place for place, column in enumerate(self.history.columns)}

        def key(place: int) -> tuple[int, int, int]:
            journal = self.tracks[place].journal
            process = journal.process
            own = [places.get(process.gpus.get(device, device), -1) for device in journal.state.owners]
            anywhere = [places.get(context.uuid, -1) for context in self.contexts if context.place == place]
            return min([at for at in own if at >= 0] or anywhere or [-1]), process.pid, place

        return sorted(range(len(self.tracks)), key=key)


def read(folder: Path, most_moments: int = MOST_MOMENTS) -> Run:
    """Read a log folder, during the run or after it.

    Raises
    ------
    ConfigError
        If it is no folder, or holds no journal.
    """
    found = [_read_file(folder / name) for name in require_logs(folder, " --record")]
    damaged = [place for journal, _ in found for place in journal.damage.places()]
    found = [(journal, known) for journal, known in found if journal.process.pid or journal.rows]
    found.sort(key=lambda pair: (pair[0].process.time, pair[0].process.file))
    journals = [journal for journal, _ in found]
    process_end.settle([journal.process for journal in journals])
    history = History(journals, find_ends(journals), most_moments)
    return Run(
        folder,
        history,
        sites.collect(journals),
        contexts.find_contexts(history.tracks),
        arenas.collect(history.tracks),
        [known for _, known in found],
        damaged,
    )


def _read_file(path: Path) -> tuple[ProcessLog, dict[str, str]]:
    """Return the log of one process, and what it says of its environment."""
    journal = ProcessLog(Process(path.name, 0), Damage(path.name))
    known: dict[str, str] = {}
    for number, line in read_objects(path, journal.damage):
        if not journal.take(line):
            journal.damage.add(number)
        elif "process" in line:
            known = {name: text for name in VARIABLES if isinstance(text := line["process"].get(name), str)}
        elif "end" in line:
            known[DROPPED] = str(line["end"].get(DROPPED, 0))
    with contextlib.suppress(OSError):
        if path.stat().st_size >= MOST_SAMPLED:
            known[FULL] = "yes"
    return journal, known
