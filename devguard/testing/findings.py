"""Findings about one test: its strays and what it left behind, as plain data that can travel between processes.

A finding holds what happened, where, and what to do. guarding.py decides which findings fail a test.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devguard.reporting.advice import advise
from devguard.reporting.stray import Stray
from devguard.support.callsite import Site

__all__ = ["describe", "Finding", "from_stray", "headline", "left_behind"]

LEFT_BEHIND = "left behind"  # the action of findings that are not strays


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a test did, at one call site.

    Attributes
    ----------
    kind : str
        The door of the stray; else what was left behind: ``"current device"``, ``"scope"``, ``"patch"`` or
        ``"install"``; ``"journal"`` if the journal was full.
    text : str
        What happened, without the place.
    action : str
        The action of the stray, or ``"left behind"``.
    count, bytes : int
        The number of occurrences, and their total bytes of tensor data.
    where : str
        ``file:line in function``; empty if no line of user code is known.
    source : str
        The text of that line, if it is available.
    advice : str
        What to do.
    """

    kind: str
    text: str
    action: str
    count: int
    bytes: int
    where: str
    source: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return asdict(self)


_DECLARE = "If another device is intended, declare it: @pytest.mark.devguard(device=..., allow=[...])."


def from_stray(stray: Stray, root: Path) -> Finding:
    """Return the finding for a stray; paths below `root` become relative to it."""
    moved = f"{stray.source} -> {stray.target}" if stray.source != stray.target else stray.source
    note = f" ({stray.note})" if stray.note else ""
    via = f", via {stray.via}" if stray.via else ""
    text = f"{moved}, owner {stray.owner}: {stray.action}{via}{note}"
    where, source = _place(stray.site, root)
    advice = f"{advise(stray.door, stray.action)} {_DECLARE}"
    return Finding(stray.door, text, stray.action, stray.count, stray.bytes, where, source, advice)


def left_behind(kind: str, text: str, advice: str, site: Site | None, root: Path) -> Finding:
    """Return the finding for something that a test left behind."""
    where, source = _place(site, root)
    return Finding(kind, text, LEFT_BEHIND, 1, 0, where, source, advice)


def _place(site: Site | None, root: Path) -> tuple[str, str]:
    if site is None:
        return "", ""
    inside = site.file.startswith(f"{root}{os.sep}")
    file = os.path.relpath(site.file, root) if inside else site.file
    return f"{file}:{site.line} in {site.function}", site.source


def headline(findings: list[Finding]) -> str:
    """Return the first line of a failure: the place and the most serious finding."""
    first = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{first.where or 'no line of user code'}: {first.kind}: {first.text}{more}"


def describe(findings: list[Finding]) -> str:
    """Return a few lines for each finding, then what to do."""
    lines: list[str] = []
    for finding in findings:
        size = f", {finding.bytes} bytes" if finding.bytes else ""
        lines.append(f"{finding.kind}: {finding.text} [{finding.count} x{size}]")
        lines.append(f"    at {finding.where or 'no line of user code'}")
        if finding.source:
            lines.append(f"        {finding.source}")
    lines += [f"To do: {advice}" for advice in dict.fromkeys(finding.advice for finding in findings)]
    return "\n".join(lines)
