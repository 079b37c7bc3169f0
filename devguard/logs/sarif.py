"""A log as SARIF 2.1.0, for code scanning: one rule a door, one result a call site.

Files are relative to the folder of the program's sources, where they lie inside it. Records that are no strays are left
out, unless the gate fails on them.
"""

from __future__ import annotations

import os
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from devguard._version import __version__
from devguard.logs import paths as log_paths
from devguard.logs import process_end
from devguard.logs.reader import Merged
from devguard.logs.summary import Summary
from devguard.support.terminal import cut, format_size, printable

__all__ = ["as_sarif"]

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"
LEVELS = {"refused": "error", "repaired": "note"}  # others are warnings
LARGEST_LINE = (1 << 31) - 1  # what readers of SARIF can hold
LONGEST = 1000  # characters of a message; GitHub shows as many


def as_sarif(summary: Summary) -> dict[str, Any]:
    """Return the log as plain data, fit for JSON."""
    gate = summary.gate
    failing = set(map(id, gate.failing)) if gate else set()
    shown = [*summary.strays, *(site for site in summary.others if id(site) in failing)]
    doors = sorted({site.door for site in shown})
    driver = {
        "name": "devguard",
        "version": __version__,
        "rules": [_rule(door) for door in doors],
    }
    notices = [
        *(("warning", f"pid {pid}: {text}") for pid, text in summary.alerts),
        *(("warning", f"pid {each.pid} {process_end.describe(each)}") for each in summary.died),
        *(("error", f"cannot be read: {place}") for place in summary.damaged),
    ]
    run = {
        "tool": {"driver": driver},
        "originalUriBaseIds": {ROOT: {"uri": _uri(Path(os.path.abspath(summary.root)).as_posix() + "/", scheme=True)}},
        "invocations": [
            {
                "executionSuccessful": not summary.damaged,
                "toolExecutionNotifications": [
                    {"level": level, "message": {"text": _text(text)}} for level, text in notices
                ],
            }
        ],
        "results": [
            {**_result(site, summary, doors), "partialFingerprints": {"devguardCallSite/v1": fingerprint}}
            for site, fingerprint in zip(shown, _fingerprints(shown, summary.root), strict=True)
        ],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(door: str) -> dict[str, Any]:
    name = _text(door)
    return {
        "id": name,
        "shortDescription": {"text": f"Work on a GPU that the process does not own (door {name})"},
        "help": {"text": f"docs/doors.md of devguard has a section for the door {name}: what goes wrong, what to do."},
        "defaultConfiguration": {"level": "warning"},
    }


def _result(site: Merged, summary: Summary, doors: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": _text(site.door),
        "ruleIndex": doors.index(site.door),
        "level": LEVELS.get(site.action, "warning"),
        "message": {"text": _message(site)},
        "properties": {"action": site.action, "count": site.count, "bytes": site.bytes},
    }
    if log_paths.is_source(site.file):
        result["locations"] = [_location(site, summary.root)]
    gate = summary.gate
    if gate is not None and gate.baseline is not None:
        is_known = any(site is known for known in gate.known)
        result["baselineState"] = "unchanged" if is_known else "new"
    return result


def _message(site: Merged) -> str:
    size = f", {format_size(site.bytes)}" if site.bytes else ""
    ranks = f" in {'rank' if len(site.ranks) == 1 else 'ranks'} {', '.join(site.ranks)}" if site.ranks else ""
    more = "".join(f"; {text}" for text in (site.via and f"via {site.via}", site.note) if text)
    where = "" if site.file else " at no line of user code"
    devices = ", ".join(site.devices)
    return _text(f"{devices}: {site.action} by the door {site.door}{where}, {site.count} x{size}{ranks}{more}")


def _location(site: Merged, root: str) -> dict[str, Any]:
    inside = log_paths.name_inside(site.file, root)
    artifact = {"uri": _uri(site.file, scheme=True)} if inside is None else {"uri": _uri(inside), "uriBaseId": ROOT}
    physical: dict[str, Any] = {"artifactLocation": artifact}
    if 0 < site.line <= LARGEST_LINE:
        physical["region"] = {"startLine": site.line}
    return {"physicalLocation": physical, "logicalLocations": [{"name": _text(site.function), "kind": "function"}]}


def _uri(path: str, *, scheme: bool = False) -> str:
    start = "file://" if scheme and path.startswith("/") else ""
    return start + quote(path.encode("utf-8", "surrogatepass"))


def _fingerprints(sites: list[Merged], root: str) -> list[str]:
    """Return for each record what stays the same when its line moves: its function, and its place in it."""
    seen: Counter[str] = Counter()
    found: dict[int, str] = {}
    for site in sorted(sites, key=lambda each: each.line):
        key = "\0".join((site.door, site.action, log_paths.name_file(site.file, root), site.function))
        found[id(site)] = sha256(f"{key}\0{seen[key]}".encode("utf-8", "surrogatepass")).hexdigest()
        seen[key] += 1
    return [found[id(site)] for site in sites]


def _text(text: str) -> str:
    return cut(printable(text), LONGEST)
