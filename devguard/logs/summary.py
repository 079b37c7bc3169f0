"""What ``devguard log`` shows in each of its formats: the selected records of a log, and the result of the gate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

from devguard.logs import paths as log_paths
from devguard.logs import process_end
from devguard.logs.gate import Gate
from devguard.logs.reader import Merged, Process
from devguard.reporting import actions

__all__ = ["count", "Summary"]


@dataclass
class Summary:
    """What to show.

    Attributes
    ----------
    processes : list of Process
        The selected processes.
    sites : list of Merged
        The selected records, in order.
    damaged : list of str
        Places of the log that cannot be read.
    root : str
        The folder of the program's sources.
    gate : Gate or None
        The result of the gate, if there is one.
    """

    processes: list[Process]
    sites: list[Merged]
    damaged: list[str]
    root: str
    gate: Gate | None = None

    @cached_property
    def strays(self) -> list[Merged]:
        """The records that count as strays."""
        return [site for site in self.sites if actions.is_stray(site.action)]

    @cached_property
    def others(self) -> list[Merged]:
        """The records that do not."""
        return [site for site in self.sites if not actions.is_stray(site.action)]

    @property
    def died(self) -> list[Process]:
        """The processes that did not come to an orderly end; first the one that died first, as far as that is known."""
        died = [process for process in self.processes if process_end.has_died(process)]
        return sorted(died, key=lambda process: inf if process.end_time is None else process.end_time)

    @property
    def alerts(self) -> list[tuple[int, str]]:
        """Why processes are not guarded as the program asked, or their logs are not complete, with their pids."""
        alerts = [(process.pid, text) for process in self.processes for text in process.alerts]
        return alerts + [
            (process.pid, f"{count(process.not_kept, 'stray')} at further lines: its log has no room for more lines")
            for process in self.processes
            if process.not_kept
        ]

    def count_others(self) -> str:
        """Return how many records are no strays, such as ``"3 placed, 1 kept"``; empty if there are none."""
        totals: Counter[str] = Counter()
        for site in self.others:
            totals[site.action] += site.count
        return ", ".join(f"{number} {action}" for action, number in totals.items())

    def place(self, site: Merged) -> str:
        """Return the line of a record, relative where possible."""
        if not site.file:
            return "no line of user code"
        return f"{log_paths.name_file(site.file, self.root)}:{site.line} in {site.function}"

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain data, fit for JSON."""
        gate = {} if self.gate is None else {"gate": self.gate.as_dict()}
        return {
            "processes": [process.as_dict() for process in self.processes],
            "strays": [{**site.as_dict(), "is_stray": actions.is_stray(site.action)} for site in self.sites],
            "damaged": self.damaged,
            **gate,
        }


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as ``"2 call sites"``."""
    return f"{number} {one if number == 1 else many or one + 's'}"
