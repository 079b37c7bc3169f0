"""The gate for CI: which records of a log fail a build, by their actions and by a baseline of known strays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devguard.logs.baseline import Baseline, Vanished
from devguard.logs.reader import Merged
from devguard.logs.selection import Selection
from devguard.reporting import actions

__all__ = ["Gate", "judge"]


@dataclass
class Gate:
    """The result.

    Attributes
    ----------
    fail_on : tuple of str
        The actions that fail.
    baseline : str or None
        The file of the known strays.
    failing : list of Merged
        The records that fail: those with such an action that are not known.
    known : list of Merged
        The records that are known.
    vanished : list of Vanished
        The known strays that are not in the log any more; empty where --rank leaves out processes that may have them.
    """

    fail_on: tuple[str, ...]
    baseline: str | None
    failing: list[Merged]
    known: list[Merged]
    vanished: list[Vanished]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data, fit for JSON."""
        return {
            "passes": not self.failing,
            "fail_on": list(self.fail_on),
            "baseline": self.baseline,
            "failing": [site.as_dict() for site in self.failing],
            "known": [site.as_dict() for site in self.known],
            "vanished": [
                {**entry.key._asdict(), "lines": list(entry.lines), "reason": entry.reason, "left": left}
                for entry, left in self.vanished
            ],
        }


def judge(
    sites: Sequence[Merged],
    fail_on: Sequence[str],
    baseline: Baseline | None = None,
    file: str | None = None,
    *,
    root: str,
    selection: Selection,
) -> Gate:
    """Judge the records of a log.

    Parameters
    ----------
    sites : sequence of Merged
        The selected records.
    fail_on : sequence of str
        Words of `actions.FAIL_ON`; by default all strays.
    baseline, file : Baseline, str, optional
        The known strays, and the file that they are from.
    root : str
        The folder of the program's sources.
    selection : Selection
        What `sites` were selected by.
    """
    named = actions.expand(fail_on)
    new, vanished = (baseline or Baseline()).compare(sites, root)
    strange = set(map(id, new))
    return Gate(
        named,
        file,
        failing=[site for site in new if actions.matches(site.action, named)],
        known=[site for site in sites if id(site) not in strange],
        vanished=[
            each
            for each in vanished
            if not selection.ranks and (not selection.doors or each.entry.key.door in selection.doors)
        ],
    )
