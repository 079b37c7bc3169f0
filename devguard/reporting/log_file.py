"""``DEVGUARD_LOG``: the journal of each process as a file of JSON lines in one folder.

Each process writes its own file. The first line names the process. A line for its state, with its owner and contexts,
follows whenever they have changed, one for each call site that strayed, and samples of its memory while it is watched
(sampler.py). The line of a call site ends with its counts, which each stray overwrites in place, so a killed process
lacks only what changed after the last event that devguard sees. The last line is the state at the end; lines for
children that failed (child_ends.py) may follow. Each line is one write. If the file cannot be written, devguard says so
once and the program goes on. ``devguard log DIR`` reads the files (logs/reader.py).
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devguard.ownership.owner import Owner
from devguard.ownership.prepare import on_prepared
from devguard.ownership.process import on_owner
from devguard.ownership.stack import on_taken
from devguard.reporting import child_ends, process_state
from devguard.reporting.journal import journal
from devguard.reporting.rows import Key, Row, format_row
from devguard.reporting.sampler import Sampler, has_subject
from devguard.support import accelerator, notices, process_exit
from devguard.support.process_file import SUFFIX, ProcessFile, encode, has_file, open_in
from devguard.support.signal_names import name_signal

__all__ = ["start", "SUFFIX"]

FLUSH_INTERVAL_S = 1.0
MOST_SAMPLED = 16 << 20  # bytes of samples, some hours of changes; then the newest overwrites the one before
SAMPLE_ROOM = 4096  # bytes, so that a longer sample fits as well
COUNTS = b'"count": %20d, "bytes": %20d}\n'  # at the end of a line; always of the same length up to 20 digits


class _Log:
    """The log file of this process.

    Attributes
    ----------
    where : str or None
        The path of the file, or why it cannot be written; None before the first attempt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_look: Callable[[str], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._file: ProcessFile | None = None
        self._rows = 0
        self._numbers: dict[Row, int] = {}  # each row that was written -> its number in the file
        self._counts_at: dict[Row, int | None] = {}  # the offsets of their counts
        self._sampled = 0  # bytes
        self._sample_at: tuple[int | None, int] = None, 0  # the place of the newest one and its bytes, after the most
        self._looked = 0.0
        self._state: dict[str, Any] = {}
        self._broken = False
        self._sampler: Sampler | None = None  # a thread, which a forked child does not have
        self.where: str | None = None

    def start(self, last_look: Callable[[str], None]) -> None:
        """Start to write, again if the doors were closed since."""
        self._last_look = last_look
        if self._pid != os.getpid():  # the parent of this forked process has stopped it
            self._reset()
        self._broken = False
        self._write(None if self._file is None else {"resumed": time.time()})
        self._state = {}
        self.write_state()
        accelerator.call_when_initialized(journal.note_first_use)
        on_owner.append(self._write_state_of)
        on_prepared.append(self._write_state_of)
        on_taken.append(self.write_state)
        gc.callbacks.append(self._look_after_collection)
        journal.attach_log(self)
        for text in notices.alerts():
            self.write_alert(text)
        notices.on_alert(self.write_alert)
        process_exit.register(self.stop)
        child_ends.watch(self.write_child)

    def restart(self) -> None:
        """Forget the rows, after the journal was cleared. In a forked child, start a new file."""
        if self._pid != os.getpid():
            if self._file is not None:
                self._file.close()  # the parent's file
            self._reset()
            process_exit.register(self.stop)
        else:
            self.flush()
        self._numbers.clear()
        self._counts_at.clear()

    def note(self, key: Key, row: Row) -> None:
        """Write a new row, or the counts of a row that has grown. Called under the journal's lock."""
        if row not in self._numbers:
            self._numbers[row] = self._rows
            self._rows += 1
            self.write_state()
            self._write_row(key, row)
            return
        if not self._write_counts(row):
            self._write_row(key, row)
        self._look_at_times()

    def flush(self) -> None:
        """Write the state of the process, if it has changed; each stray has written its own row."""
        self._looked = time.monotonic()
        self.write_state()

    def _look_at_times(self) -> None:
        if time.monotonic() - self._looked >= FLUSH_INTERVAL_S:
            self.flush()

    def _write_row(self, key: Key, row: Row) -> None:
        line = {"stray": self._numbers[row], **format_row(key, row, *row.total()).as_dict()}
        counts = COUNTS % (line.pop("count"), line.pop("bytes"))
        data = encode(line)[:-2] + b", " + counts
        at = self._write(data)
        self._counts_at[row] = None if at is None else at + len(data) - len(counts)

    def _write_counts(self, row: Row) -> bool:
        """Overwrite the counts of a row in the file; return whether that was possible."""
        at = self._counts_at.get(row)
        return self._overwrite(at, COUNTS % row.total())

    def _overwrite(self, at: int | None, data: bytes) -> bool:
        """Overwrite a part of the file; return whether nothing is left to write: that was possible, or nothing is."""
        if at is None or self._file is None or self._broken:
            return self._broken
        try:
            return self._file.overwrite(at, data)
        except Exception as error:  # noqa: BLE001 - a log must not stop the program
            self._give_up(error)
            return True

    def write_state(self) -> None:
        """Write the owner and the contexts of the process, if they have changed."""
        try:
            state = process_state.owners()
        except Exception:  # noqa: BLE001 - a log must not stop the program
            return
        if state != self._state and (self._state or any(state.values())):
            self._state = state
            self._write({"state": state, "time": time.time()})
        if has_subject(state):
            self.start_sampler()

    def start_sampler(self) -> None:
        """Start the thread that samples memory, and looks for what no door sees."""
        if self._sampler is None and not self._broken:
            with contextlib.suppress(RuntimeError):  # The system starts no more threads: there are no samples.
                self._sampler = Sampler(self.folder, self._write_sample, self._look_at_times)

    def _write_sample(self, found: dict[str, Any]) -> None:
        line = encode({"now": found, "time": time.time()})
        if self._sampled < MOST_SAMPLED:
            self._sampled += len(line)
            self._write(line)
            return
        at, size = self._sample_at
        if len(line) > size or not self._overwrite(at, _fill(line, size)):
            size = -(-len(line) // SAMPLE_ROOM) * SAMPLE_ROOM
            self._sample_at = self._write(_fill(line, size)), size

    def _write_state_of(self, owner: Owner | None) -> None:
        self.write_state()

    def _look_after_collection(self, phase: str, info: dict[str, int]) -> None:
        """Look for new contexts now and then: C++ code opens them, and a server may never end in an orderly way."""
        if phase == "stop":
            self._look_at_times()

    def _stop_listening(self) -> None:
        listeners: tuple[tuple[list[Any], Any], ...] = (
            (on_owner, self._write_state_of),
            (on_prepared, self._write_state_of),
            (on_taken, self.write_state),
            (gc.callbacks, self._look_after_collection),
        )
        for row, listener in listeners:
            if listener in row:
                row.remove(listener)

    def write_alert(self, text: str) -> None:
        """Write a text of `notices.alert`, once."""
        if self._file is not None and not self._broken:
            try:
                self._file.write_alert(text)
            except Exception as error:  # noqa: BLE001 - a log must not stop the program
                self._give_up(error)

    def write_child(self, pid: int, code: int) -> None:
        """Write how a child with a log in this folder ended, also after the last line; a signal is negative."""
        if self._file is not None and self._pid == os.getpid() and has_file(self.folder, pid):
            end = {"code": code} if code > 0 else {"signal": name_signal(-code)}
            self._file.write(encode({"child": {"pid": pid, **end}, "time": time.time()}))

    def _write(self, line: dict[str, Any] | bytes | None) -> int | None:
        """Write a line, and return its offset if that is known; None only creates the file, if there is none yet."""
        if self._broken:
            return None
        try:
            if self._file is None:
                self._file = open_in(self.folder)
                self.where = str(self._file.path)
            if line is not None:
                return self._file.write(line if isinstance(line, bytes) else encode(line))
        except Exception as error:  # noqa: BLE001 - a log must not stop the program
            self._give_up(error)
        return None

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        self.where = f"devguard cannot write its log to {self.folder}: {reason}."
        notices.alert(f"{self.where} Strays are kept in memory only.")

    def stop(self) -> None:
        """Write the remaining rows and the state of the process at its end, and close the file."""
        process_exit.forget(self.stop)
        if self._pid != os.getpid():
            return
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.stop()
        end: dict[str, Any] | None = None
        try:
            if self._last_look is not None:
                self._last_look("at the end of the process")  # may find a last stray
            if sampler is not None:
                sampler.look()  # a short process may have none yet
            end = {"time": time.time(), **process_state.describe()}
        except Exception as error:  # noqa: BLE001 - the doors must close, and the process must end
            notices.warn_user(f"devguard could not look for a last stray: {type(error).__name__}: {error}")
        finally:
            journal.detach_log()
            notices.stop_on_alert(self.write_alert)
            self._stop_listening()
            if end is not None:
                self._write({"end": end})
            if self._file is not None:
                self._file.close()
            self._broken = True


def _fill(line: bytes, size: int) -> bytes:
    """Return a line of JSON of `size` bytes."""
    return line[:-1].ljust(size - 1) + b"\n"


_logs: dict[Path, _Log] = {}  # one file a process and folder, also where the doors open and close many times


def start(folder: Path, last_look: Callable[[str], None]) -> None:
    """Write the journal of this process to a file in `folder` from now on, until the process ends. Never raises.

    Parameters
    ----------
    folder : Path
        The folder; created if it does not exist.
    last_look : callable
        ``last_look(when)`` looks for strays that no door has reported yet; called once, at the end.
    """
    if folder not in _logs:
        _logs[folder] = _Log(folder)
    _logs[folder].start(last_look)
