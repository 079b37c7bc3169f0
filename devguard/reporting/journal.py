"""The journal: it counts strays per call site.

The journal keeps one row per (door, devices, action, call site), and at most `MAX_ROWS` rows. Strays at further call
sites are only counted, in `dropped`. It never holds a frame or a tensor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Set
from types import CodeType
from typing import NamedTuple, Protocol

from devguard.ownership.process import process
from devguard.ownership.stack import local, site_of_work
from devguard.reporting import announcements
from devguard.reporting.rows import Key, Row, Tally, format_row
from devguard.reporting.stray import Action, Occurrence, Stray
from devguard.support import callsite, forks
from devguard.support.callsite import Frame

__all__ = ["Journal", "journal", "Mark"]

MAX_ROWS = 1024


class Log(Protocol):
    """Receives each row that is new or has grown, under the journal's lock; see log_file.py."""

    def note(self, key: Key, row: Row) -> None: ...

    def flush(self) -> None: ...

    def write_state(self) -> None: ...

    def start_sampler(self) -> None: ...

    def restart(self) -> None: ...

    def stop(self) -> None: ...

    @property
    def where(self) -> str | None: ...


class Mark(NamedTuple):
    """The counts of the journal at one point; invalid when `Journal.life` is no longer `life`."""

    life: object
    dropped: int
    rows: dict[Key, tuple[int, int]]


class Journal:
    """Every stray of this process, counted per call site.

    Thread-safe. A forked child starts with an empty journal.

    Attributes
    ----------
    life : object
        Replaced after a fork and by `clear`: earlier rows are then invalid.
    """

    life: object

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._watches_forks = False
        self.log: Log | None = None
        self._lock = forks.new_lock()  # reentrant, because a finalizer may stray while a row is written to the log
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self.life = object()
        self._rows: dict[Key, Row] = {}
        self._dropped = 0
        process.renew()  # Tallies handed out earlier are invalid.
        if self.log is not None:
            self.log.restart()

    def watch_forks(self) -> None:
        """Empty the journal in every forked child; reading the process ID at each stray would be a system call."""
        if self._watches_forks:
            return
        self._watches_forks = True
        self._restart_if_forked()  # The fork may have come before the first stray.
        os.register_at_fork(after_in_child=self._start)

    def _restart_if_forked(self) -> None:
        # A fork copies the parent's strays.
        if os.getpid() != self._pid:
            self._start()

    def record(self, occurrence: Occurrence, action: Action, target: str | None = None) -> Frame | None:
        """Count one stray, and keep its stack if it is the first at its call site; return the call site.

        The parameters are those of `enter`. Without a start, the search for the call site begins at the caller.
        """
        if occurrence.start is None and occurrence.origin is None:
            occurrence = occurrence._replace(start=sys._getframe(1))
        return self.enter(occurrence, action, target)[0]

    def enter(
        self, occurrence: Occurrence, action: Action, target: str | None = None
    ) -> tuple[Frame | None, Row | None, bool]:
        """Count one stray, and keep its stack if it is the first at its call site.

        Parameters
        ----------
        occurrence : Occurrence
            The stray, with a start or an origin.
        action : str
            As in `Stray`.
        target : str, optional
            The device on which the work is now; its source by default.

        Returns
        -------
        Frame or None
            The call site; None where the whole stack belongs to libraries.
        Row or None
            The row, which `grow` takes for the next stray at this call site; None if the journal is full.
        bool
            Whether the row is new.
        """
        if not self._watches_forks:
            self.watch_forks()
        door, source, owner, nbytes, start, *_, origin = occurrence
        code: CodeType | None = None
        line, via = 0, None
        if origin is not None:
            code, line, via, _ = origin
        elif start is not None:
            code, line, via = callsite.find(start)
            if code is None and (submitted := site_of_work(local.stack)) is not None:
                code, line = submitted[:2]
        # The identity of the code object, because its own hash reads all of its bytecode. The row keeps the object
        # alive.
        key = (id(code), line, door, source, target or source, owner, action)
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self.grow(row, nbytes)
                return row.site, row, False
            site = None if code is None else Frame(code, line)
            if len(self._rows) >= self._max_rows:
                self._dropped += 1
                return site, None, False
            row = self._rows[key] = Row(key, occurrence, site, via)
            if self.log is not None:
                self.log.note(key, row)
        # Still locked for a finalizer that strays while this thread holds the lock.
        announcements.announce(row, nbytes, is_locked=self._lock._is_owned())
        return site, row, True

    def grow(self, row: Row, nbytes: int) -> None:
        """Count one more stray in a row from `enter`, which is valid until the next era of the process."""
        with self._lock:
            row.own.count += 1
            row.own.bytes += nbytes
            if self.log is not None:
                self.log.note(row.key, row)

    def tally(self, row: Row, stack: int, living: Callable[[], Set[int]]) -> Tally | None:
        """Return the tally in which one thread counts strays of a row without a lock; None if a log needs each stray.

        Parameters
        ----------
        row : Row
            A row from `enter`, valid until the next era of the process.
        stack : int
            The identity of the thread's stack.
        living : callable
            Returns the identities of the stacks of all threads.
        """
        with self._lock:
            if self.log is not None:
                return None
            if len(row.tallies) >= row.room and stack not in row.tallies:
                row.fold(living())
            return row.tallies.setdefault(stack, Tally())

    def strays(self) -> tuple[Stray, ...]:
        """Return one record per call site, in the order of the first stray."""
        self._restart_if_forked()
        with self._lock:
            rows = [(key, row, *row.total()) for key, row in self._rows.items()]
        return tuple(format_row(key, row, count, total) for key, row, count, total in rows)

    def mark(self) -> Mark:
        """Return the counts of all call sites so far."""
        self._restart_if_forked()
        with self._lock:
            rows = {key: row.total() for key, row in self._rows.items()}
            return Mark(self.life, self._dropped, rows)

    def since(self, mark: Mark) -> tuple[Stray, ...]:
        """Return one record for every call site that strayed since `mark`, with the count and bytes since then."""
        self._restart_if_forked()
        if mark.life is not self.life:  # All rows are newer than the mark.
            mark = Mark(self.life, 0, {})
        grown = []
        with self._lock:
            for key, row in self._rows.items():
                (count, total), (before, total_before) = row.total(), mark.rows.get(key, (0, 0))
                if count > before:
                    grown.append((key, row, count - before, total - total_before))
        return tuple(format_row(key, row, count, total) for key, row, count, total in grown)

    def dropped_since(self, mark: Mark) -> int:
        """Return the number of strays since `mark` for which the journal had no room."""
        return self.dropped - (mark.dropped if mark.life is self.life else 0)

    @property
    def total(self) -> int:
        """The number of strays in this process."""
        self._restart_if_forked()
        with self._lock:
            return self._dropped + sum(row.total()[0] for row in self._rows.values())

    @property
    def dropped(self) -> int:
        """The number of strays for which the journal had no room."""
        self._restart_if_forked()
        return self._dropped

    def attach_log(self, log: Log) -> None:
        """Pass each row that is new or grows from now on to `log`."""
        with self._lock:
            self.log = log
        self.watch_forks()
        process.renew()  # The log needs each stray from now on: tallies handed out earlier are invalid.

    def note_state(self) -> None:
        """Let the log, if there is one, write the owners and contexts of the process if they have changed."""
        log = self.log
        if log is not None:
            log.write_state()

    def note_first_use(self) -> None:
        """Let the log, if there is one, sample the memory of this process, which is initialising CUDA."""
        log = self.log
        if log is not None:
            log.start_sampler()

    def detach_log(self) -> None:
        """Write the counts that have grown, and pass no more rows to the log."""
        with self._lock:
            log, self.log = self.log, None
            if log is not None:
                log.flush()

    def clear(self) -> None:
        """Forget all strays."""
        self._start()


journal = Journal()
