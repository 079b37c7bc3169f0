"""Which records of a log are shown, and in which order: ``--door``, ``--rank``, ``--sort`` and lists like them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from devguard.errors import ConfigError
from devguard.support.terminal import list_some

if TYPE_CHECKING:
    from devguard.logs.reader import Merged, Process

__all__ = ["NO_RANK", "Selection", "SORTS", "split_names"]

NO_RANK = "none"  # how --rank names the processes that no launcher has given a rank
MOST_NAMED = 40  # names that one error lists

SORTS: dict[str, Callable[[Merged], Any]] = {  # `line`: records without a line last
    "bytes": lambda site: (-site.bytes, -site.count),
    "count": lambda site: (-site.count, -site.bytes),
    "line": lambda site: (not site.file, site.file, site.line, site.door),
    "door": lambda site: (site.door, -site.bytes, -site.count),
    "action": lambda site: (site.action, -site.bytes, -site.count),
}


@dataclass(frozen=True)
class Selection:
    """The doors and ranks to show; an empty tuple stands for all.

    Attributes
    ----------
    doors, ranks : tuple of str
        The names; `NO_RANK` stands for processes without a rank.
    sort : str
        A key of `SORTS`.
    """

    doors: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    sort: str = "bytes"

    def has_process(self, process: Process) -> bool:
        """Return whether the records of a process are shown."""
        return not self.ranks or (NO_RANK if process.rank is None else process.rank) in self.ranks

    def pick(self, sites: Iterable[Merged]) -> list[Merged]:
        """Return the records to show, in order."""
        return sorted((site for site in sites if not self.doors or site.door in self.doors), key=SORTS[self.sort])

    def check(self, processes: Iterable[Process], sites: Iterable[Merged], doors: Collection[str]) -> None:
        """Check the names against a log.

        Parameters
        ----------
        processes, sites : iterable
            All that the log holds.
        doors : collection of str
            The doors of this release; one that only the log names is valid too.

        Raises
        ------
        ConfigError
            If there is no such door, or the log has no such rank.
        """
        if self.doors:
            _check("--door", self.doors, sorted({*doors, *(site.door for site in sites)}), "there is no such door")
        if self.ranks:
            found = {NO_RANK if process.rank is None else process.rank for process in processes}
            _check("--rank", self.ranks, sorted(found, key=_by_number), "the log has no process with that rank")


def split_names(option: str, texts: Sequence[str], valid: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the names of an option that may be repeated and may hold commas, each once.

    Parameters
    ----------
    option : str
        The option, for the message.
    texts : sequence of str
        Its values.
    valid : collection of str, optional
        The names that are valid; by default all, because they are checked later.

    Raises
    ------
    ConfigError
        If no name is given, or one that is not valid.
    """
    names = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
    if not names:
        more = f" Valid: {list_some(valid, MOST_NAMED)}." if valid is not None else ""
        raise ConfigError(f"{option} names nothing. Give one name, or several separated by commas.{more}")
    if valid is not None:
        _check(option, names, valid, "there is no such name")
    return names


def _check(option: str, names: Iterable[str], valid: Collection[str], problem: str) -> None:
    for name in names:
        if name not in valid:
            raise ConfigError(f"{option} {name}: {problem}. Valid: {list_some(valid, MOST_NAMED)}.")


def _by_number(rank: str) -> tuple[bool, int, str]:
    is_number = rank.isascii() and rank.isdecimal() and len(rank) < 20
    return not is_number, int(rank) if is_number else 0, rank
