"""The file of a baseline: JSON to commit, which may hold anything when it is read. docs/log.md describes the format.

It holds nothing that differs between two equal runs, and one entry a line, so that its changes are easy to review and
to merge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from devguard.errors import ConfigError
from devguard.logs.baseline import Baseline, Entry, Key
from devguard.logs.lines import parse

__all__ = ["read", "read_reasons", "write"]

MARK, VERSION = "devguard_baseline", 1
MOST_READ = 32 << 20  # bytes
LARGEST_LINE = 1 << 63
WRITE_IT = "devguard log DIR --write-baseline FILE"


def read(path: Path) -> Baseline:
    """Read a file.

    Raises
    ------
    ConfigError
        If it cannot be read, or is no baseline.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_READ + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Write it: {WRITE_IT}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{path} cannot be read: {_explain(error)}. Name a baseline that you may read.") from None
    try:
        if len(data) > MOST_READ:
            raise ValueError(f"it has more than {MOST_READ >> 20} MiB")
        return Baseline(_entries(parse(data)))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no baseline of devguard: {error}. Correct it, or remove it and write it again: {WRITE_IT}"
        ) from None


def read_reasons(path: Path) -> Baseline:
    """Return the baseline that `write` would replace, for its reasons; an empty one if there is none.

    Raises
    ------
    ConfigError
        If the file holds something else, which must not be lost.
    """
    try:
        is_there = path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):  # `write` says why
        is_there = False
    return read(path) if is_there else Baseline()


def write(path: Path, baseline: Baseline) -> None:
    """Write the file.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    rows = ["\n    " + json.dumps(_as_dict(entry)) for _, entry in sorted(baseline.entries.items())]
    text = f'{{\n  "{MARK}": {VERSION},\n  "strays": [{",".join(rows)}\n  ]\n}}\n'
    try:
        path.write_text(text, encoding="ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {_explain(error)}. Name a file that you may write.") from None


def _explain(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _as_dict(entry: Entry) -> dict[str, Any]:
    reason = {} if entry.reason is None else {"reason": entry.reason}
    return {**entry.key._asdict(), "lines": list(entry.lines), **reason}


def _entries(found: Any) -> list[Entry]:
    """Return the entries of a file; raise ValueError that says what is wrong."""
    if not isinstance(found, dict) or MARK not in found:
        raise ValueError(f'it is no JSON object with the key "{MARK}"')
    version = found[MARK]
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(f'"{MARK}" is {json.dumps(version)[:40]}, and this release of devguard reads {VERSION}')
    rows = found.get("strays")
    if not isinstance(rows, list):
        raise ValueError('"strays" is missing, or is no list')
    return [_entry(row, f"strays[{number}]") for number, row in enumerate(rows)]


def _entry(row: Any, where: str) -> Entry:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    for name in Key._fields:
        if not isinstance(row.get(name), str):
            raise ValueError(f'{where}: "{name}" is missing, or is no text')
    lines, reason = row.get("lines"), row.get("reason")
    if not isinstance(lines, list) or not lines or not all(map(_is_line, lines)):
        raise ValueError(f'{where}: "lines" is missing, or is no list of line numbers')
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f'{where}: "reason" is no text')
    return Entry(Key(*(row[name] for name in Key._fields)), tuple(sorted(set(lines))), reason)


def _is_line(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_LINE
