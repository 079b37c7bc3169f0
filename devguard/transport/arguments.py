"""The arguments of an arena: readers, budgets, and the line of a put."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

from devguard.errors import ConfigError
from devguard.support import callsite
from devguard.support.sizes import is_budget, parse_size
from devguard.transport.leases import PAGE, Readers
from devguard.transport.wire import MAX_NAME

__all__ = ["check_readers", "find_site", "parse_budget", "PutSite"]


class PutSite(NamedTuple):
    """The line of a put."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def find_site(frame: FrameType) -> PutSite:
    """Return the line of user code that called `frame`."""
    code, line, _ = callsite.find(frame)
    return PutSite("<unknown>", 0) if code is None else PutSite(code.co_filename, line)


def check_readers(to: int | Sequence[str]) -> Readers:
    """Return the readers that a put names."""
    advice = "Valid: the number of readers, from 1, or their names, such as to=['tp0', 'tp1']."
    if isinstance(to, int) and not isinstance(to, bool):
        if to < 1:
            raise ConfigError(f"to={to}: no reader would ever release it. {advice}")
        return to
    names: tuple[Any, ...] = () if isinstance(to, (str, bytes)) or not isinstance(to, Sequence) else tuple(to)
    if not names or not all(isinstance(name, str) and 0 < len(name.encode()) <= MAX_NAME for name in names):
        raise ConfigError(f"to={to!r}. {advice} A name has 1 to {MAX_NAME} bytes.")
    if len(set(names)) < len(names):
        raise ConfigError(f"to={to!r}: a name stands twice.")
    return names


def parse_budget(budget: int | str) -> int:
    """Return the bytes of a budget, rounded down to pages."""
    size = parse_size(budget) if isinstance(budget, str) else budget
    if not is_budget(size):
        raise ConfigError(f"budget={budget!r}: valid is a size such as '1GiB', '512M' or 1 << 30, at least 64 KiB.")
    return size // PAGE * PAGE
