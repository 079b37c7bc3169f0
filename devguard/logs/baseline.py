"""A baseline: the strays of a program that are known; baseline_file.py reads and writes it.

An entry stands for the strays of one function: file, function, door, action and kind of owner must agree. Lines,
counts, bytes, devices and ranks may change, so that an entry survives edits above it and runs on more GPUs. But a
function in which more lines stray than in the entry has a new stray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from devguard.logs import paths as log_paths
from devguard.logs.reader import Merged

__all__ = ["Baseline", "Entry", "Key", "Vanished"]

MOST_PAIRS = 100_000  # of lines of one function that are compared with each other


class Key(NamedTuple):
    """What an entry and the strays that it stands for have in common.

    Attributes
    ----------
    file, function : str
        As `log_paths.name_file` names it; empty if no line of user code was on the stack.
    door, action : str
        As in `devguard.Stray`.
    owner : str
        ``"cuda"`` or ``"cpu"``: what strays in a tokenizer may be harmless there, and new in a worker.
    """

    file: str
    function: str
    door: str
    action: str
    owner: str


@dataclass(frozen=True)
class Entry:
    """The known strays of one function.

    Attributes
    ----------
    key : Key
        What they have in common.
    lines : tuple of int
        Their lines when the file was written; 0 stands for no line of user code.
    reason : str or None
        Why they are known, in words; written by people, and kept when the file is written again.
    """

    key: Key
    lines: tuple[int, ...]
    reason: str | None = None

    def __str__(self) -> str:
        file, function, door, action, owner = self.key
        where = f"at {file}:{','.join(map(str, self.lines))} in {function}" if file else "at no line of user code"
        return f"{door} [{action}], owner {owner or 'unknown'}, {where}"


class Vanished(NamedTuple):
    """An entry of which only `left` lines still stray."""

    entry: Entry
    left: int


class Baseline:
    """The entries, by their keys.

    Parameters
    ----------
    entries : iterable of Entry
        Those with the same key, as after a merge of two branches, become one.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: dict[Key, Entry] = {}
        for entry in entries:
            known = self.entries.get(entry.key, entry)
            lines = tuple(sorted({*known.lines, *entry.lines}))
            self.entries[entry.key] = Entry(entry.key, lines, known.reason or entry.reason)

    @classmethod
    def of(cls, sites: Iterable[Merged], root: str, before: Baseline) -> Baseline:
        """Return the baseline in which these strays are known, with the reasons of the one `before`."""
        reasons = {key: entry.reason for key, entry in before.entries.items()}
        return cls(Entry(key, tuple(lines), reasons.get(key)) for key, lines in _lines_by_key(sites, root).items())

    def compare(self, sites: Sequence[Merged], root: str) -> tuple[list[Merged], list[Vanished]]:
        """Compare the baseline with a log.

        Parameters
        ----------
        sites : sequence of Merged
            The call sites of the log.
        root : str
            The folder of the program's sources.

        Returns
        -------
        new : list of Merged
            The call sites that are not known.
        vanished : list of Vanished
            The entries of which lines do not stray any more.
        """
        found = _lines_by_key(sites, root)
        entries = sorted(self.entries.items())
        known = {key: entry.lines for key, entry in entries}
        new = {key: set(_find_new(known.get(key, ()), lines)) for key, lines in found.items()}
        vanished = [Vanished(entry, len(found.get(key, ()))) for key, entry in entries]
        return (
            [site for site in sites if any(site.line in new[key] for key in _keys(site, root))],
            [each for each in vanished if each.left < len(each.entry.lines)],
        )


def _keys(site: Merged, root: str) -> Iterator[Key]:
    """Return the keys of a call site, one for each kind of owner."""
    for owner in sorted({owner.partition(":")[0] for owner in site.owners}) or [""]:
        yield Key(log_paths.name_file(site.file, root), site.function, site.door, site.action, owner)


def _lines_by_key(sites: Iterable[Merged], root: str) -> dict[Key, list[int]]:
    found: dict[Key, set[int]] = {}
    for site in sites:
        for key in _keys(site, root):
            found.setdefault(key, set()).add(site.line)
    return {key: sorted(lines) for key, lines in found.items()}


def _find_new(known: Sequence[int], found: Sequence[int]) -> list[int]:
    """Return the lines of a function that are new: as many as it has more than it is known to have.

    Where lines have moved, it is a guess which ones are new: those that fit worst if all known lines moved together.
    """
    surplus = len(found) - len(known)
    if surplus <= 0:
        return []
    distance = 0
    if known and len(known) * len(found) <= MOST_PAIRS:
        moves = Counter(new - old for old in known for new in found)
        distance = max(moves, key=lambda move: (moves[move], -abs(move), move))
    expected = {line + distance for line in known}
    left = [line for line in found if line not in expected]
    unseen = expected.difference(found)
    if unseen and len(unseen) * len(left) <= MOST_PAIRS:  # some known lines moved otherwise: they are the nearest ones
        left.sort(key=lambda line: min(abs(line - other) for other in unseen))
    return left[len(left) - surplus :]
