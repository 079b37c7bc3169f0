"""The journal: it counts strays per call site.

The journal is bounded: it keeps one row per (door, devices, action, call site) and at most `MAX_ROWS` rows;
what no longer fits is counted and its rows are not. It never holds a frame or a tensor.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Set
from types import FrameType
from typing import Any, NamedTuple, Protocol

from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.ownership.process import process
from devguard.reporting.rows import Key, Row, Tally, format_row
from devguard.reporting.stray import Action, Stray
from devguard.support import callsite
from devguard.support.callsite import Frame, Origin, Site

__all__ = ["Mark", "journal", "refused"]

MAX_ROWS = 1024


class Log(Protocol):
    """Who is told of every row that is new or has grown, under the journal's lock; see logs.py."""

    def note(self, key: Key, row: Row) -> None: ...

    def flush(self) -> None: ...

    def restart(self) -> None: ...

    def stop(self) -> None: ...

    @property
    def where(self) -> str | None: ...


class Mark(NamedTuple):
    """A point in the life of the journal; `life` is the one journal it belongs to, before a fork or a clearing."""

    life: object
    dropped: int
    rows: dict[Key, tuple[int, int]]


class Journal:
    """Every stray of this process, counted per call site.

    Safe between threads. A forked child starts with an empty one.

    Attributes
    ----------
    life : object
        Another one after a fork or a clearing: rows from before count no more.
    """

    life: object

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._watches_forks = False
        self.log: Log | None = None
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self.life = object()
        self._lock = threading.RLock()  # a finalizer may stray while a row is written to the log
        self._rows: dict[Key, Row] = {}
        self._dropped = 0
        process.renew()  # tallies handed out earlier are invalid
        if self.log is not None:
            self.log.restart()

    def watch_forks(self) -> None:
        """Start anew in every forked child: asking for the process's number at each stray would be a system call."""
        if self._watches_forks:
            return
        self._watches_forks = True
        self._same_process()  # forked before its first stray
        os.register_at_fork(after_in_child=self._start)

    def _same_process(self) -> None:
        # a fork brings the parent's strays along, and perhaps a lock that is held by a thread which is not here
        if os.getpid() != self._pid:
            self._start()

    def record(
        self,
        door: str,
        source: str,
        target: str,
        owner: str,
        action: Action,
        nbytes: int,
        dtype: str | None = None,
        shape: Any = None,
        start: FrameType | None = None,
        note: str | None = None,
        origin: Origin | None = None,
    ) -> Frame | None:
        """Count one stray, and keep its stack if it is the first of its call site; return the call site.

        The parameters are those of `enter`.
        """
        if start is None:
            start = sys._getframe(1)
        return self.enter(door, source, target, owner, action, nbytes, dtype, shape, start, note, origin)[0]

    def enter(
        self,
        door: str,
        source: str,
        target: str,
        owner: str,
        action: Action,
        nbytes: int,
        dtype: str | None,
        shape: Any,
        start: FrameType,
        note: str | None,
        origin: Origin | None,
    ) -> tuple[Frame | None, Row | None]:
        """Count one stray, and keep its stack if it is the first of its call site.

        Parameters
        ----------
        door, source, target, owner, action, dtype, shape
            As in `Stray`.
        nbytes : int
            Bytes of tensor data.
        start : frame
            Where to begin to look for the call site.
        note : str or None
            What else the door knows; that of the first one is kept.
        origin : Origin or None
            Where it came from, if that was earlier; then `start` says nothing.

        Returns
        -------
        Frame or None
            The call site; None where the whole stack belongs to libraries.
        Row or None
            What `grow` takes for the next stray like this one; None if there is no room for it.
        """
        if not self._watches_forks:
            self.watch_forks()
        code, line, via = callsite.find(start) if origin is None else origin[:3]
        # by identity: a code object's own hash goes through all of its bytecode, and the row keeps the object alive
        key = (id(code), line, door, source, target, owner, action)
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self.grow(row, nbytes)
                return row.site, row
            site = None if code is None else Frame(code, line)
            if len(self._rows) >= self._max_rows:
                self._dropped += 1
                return site, None
            stack = callsite.stack(start) if origin is None else origin.stack
            row = self._rows[key] = Row(key, site, via, stack, nbytes, dtype, shape)
            row.note = note
            if self.log is not None:
                self.log.note(key, row)
        if action == "warned":
            more = f" ({note})" if note else ""
            _warn(site, f"{door}: {_what(nbytes)} went to {source}; this scope owns {owner}{more}.")
        return site, row

    def grow(self, row: Row, nbytes: int) -> None:
        """Count one more stray of a call site that `enter` gave a row; invalid in the next era of the process."""
        with self._lock:
            row.own.count += 1
            row.own.bytes += nbytes
            if self.log is not None:
                self.log.note(row.key, row)

    def tally(self, row: Row, stack: int, living: Callable[[], Set[int]]) -> Tally | None:
        """Return where one thread counts strays of that row without a lock; None if a log is to be told of each.

        Parameters
        ----------
        row : Row
            What `enter` gave; invalid in the next era of the process.
        stack : int
            The identity of that thread's stack.
        living : callable
            Returns the identities of all stacks.
        """
        with self._lock:
            if self.log is not None:
                return None
            if len(row.tallies) >= row.room and stack not in row.tallies:
                row.fold(living())
            return row.tallies.setdefault(stack, Tally())

    def strays(self) -> tuple[Stray, ...]:
        """Return one record per call site, in the order of their first time."""
        self._same_process()
        with self._lock:
            rows = [(key, row, *row.total()) for key, row in self._rows.items()]
        return tuple(format_row(key, row, count, total) for key, row, count, total in rows)

    def mark(self) -> Mark:
        """Return how much each call site strayed until now."""
        self._same_process()
        with self._lock:
            rows = {key: row.total() for key, row in self._rows.items()}
            return Mark(self.life, self._dropped, rows)

    def since(self, mark: Mark) -> tuple[Stray, ...]:
        """Return one record for every call site that strayed since `mark`, with the count and bytes since then."""
        self._same_process()
        if mark.life is not self.life:  # taken before a fork or a clearing: all that is here came later
            mark = Mark(self.life, 0, {})
        grown = []
        with self._lock:
            for key, row in self._rows.items():
                (count, total), (before, total_before) = row.total(), mark.rows.get(key, (0, 0))
                if count > before:
                    grown.append((key, row, count - before, total - total_before))
        return tuple(format_row(key, row, count, total) for key, row, count, total in grown)

    def dropped_since(self, mark: Mark) -> int:
        """Return how many strays the journal had no room for since `mark`."""
        return self.dropped - (mark.dropped if mark.life is self.life else 0)

    @property
    def total(self) -> int:
        """How many strays there were in this process."""
        self._same_process()
        with self._lock:
            return self._dropped + sum(row.total()[0] for row in self._rows.values())

    @property
    def dropped(self) -> int:
        """How many of them the journal had no room for."""
        self._same_process()
        return self._dropped

    def keep_log(self, log: Log) -> None:
        """Tell `log` of every row from here on."""
        with self._lock:
            self.log = log
        self.watch_forks()
        process.renew()  # from here on each stray is written to the log: tallies handed out earlier are invalid

    def stop_log(self) -> None:
        """Tell the log of no row any more, after what has grown."""
        with self._lock:
            log, self.log = self.log, None
            if log is not None:
                log.flush()

    def clear(self) -> None:
        """Forget everything."""
        self._start()


journal = Journal()


def _what(nbytes: int) -> str:
    return f"{nbytes} bytes" if nbytes else "work"


def _warn(site: Frame | None, message: str) -> None:
    """Warn at the user's line, so that Python's own filters and its display of the source work."""
    if site is None:
        warnings.warn(message, StrayDeviceWarning, stacklevel=4)
    else:
        warnings.warn_explicit(message, StrayDeviceWarning, site.code.co_filename, site.line)


def refused(door: str, source: str, owner: str, nbytes: int, advice: str, **known: Any) -> StrayDeviceError:
    """Record a stray that is about to be refused, and return the error to raise.

    Parameters
    ----------
    door, source, owner : str
        As in `Stray`.
    nbytes : int
        Bytes of tensor data.
    advice : str
        What the reader can do about it.
    **known
        `dtype` and `shape`, where the door knows them; `start` as for `Journal.record`.
    """
    known.setdefault("start", sys._getframe(1))
    site = journal.record(door, source, source, owner, "refused", nbytes, **known)
    where = f"{Site.of(site)}" if site else "no line of user code (see the stack in devguard.strays())"
    return StrayDeviceError(
        f"{door}: {_what(nbytes)} {'were' if nbytes else 'was'} about to go to {source}, but this scope owns {owner}. "
        f"Call site: {where}. {advice}"
    )
