"""Records and processes as `devguard.logs.reader` returns them, for tests of what is made of a log."""

from __future__ import annotations

from typing import Any

from devguard.logs import gate
from devguard.logs.baseline import Baseline
from devguard.logs.reader import Merged, Process
from devguard.logs.selection import Selection
from devguard.logs.summary import Summary

__all__ = ["EVIL", "judged", "process", "site", "summary"]

ROOT = "/srv/program"
EVIL = "\x1b[31m|`<b>@user</b>`|\r\n\u202e\udcff\x7f"  # what another user may write to a log


def site(line: int = 43, **changes: Any) -> Merged:
    """Return a record: one stray of 1 MiB in `receive` of serve.py, in a process that owns cuda:1."""
    known: dict[str, Any] = {
        "door": "load",
        "action": "observed",
        "file": f"{ROOT}/serve.py",
        "line": line,
        "function": "receive",
        "count": 1,
        "bytes": 1 << 20,
        "devices": ["cuda:0"],
        "owners": ["cuda:1"],
        "processes": [7],
    }
    return Merged(**known | changes)


def process(pid: int = 7, **changes: Any) -> Process:
    """Return a process that ended in an orderly way."""
    known: dict[str, Any] = {"host": "node7", "command": "serve", "owner": "cuda:1", "ended": True, "end": "ended"}
    return Process(f"{pid}.jsonl", pid, **known | changes)


def summary(*sites: Merged, **changes: Any) -> Summary:
    """Return the summary of one process with these records."""
    known: dict[str, Any] = {"processes": [process()], "sites": list(sites), "damaged": [], "root": ROOT}
    return Summary(**known | changes)


def judged(*sites: Merged, known: list[Merged] | None = None, **changes: Any) -> Summary:
    """Return such a summary with a gate that fails on strays; those of a baseline with the `known` records pass."""
    found = summary(*sites, **changes)
    baseline = None if known is None else Baseline.of(known, found.root, Baseline())
    file = None if known is None else "base.json"
    found.gate = gate.judge(sites, (), baseline, file, root=found.root, selection=Selection())
    return found
