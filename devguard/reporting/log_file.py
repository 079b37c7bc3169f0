"""``DEVGUARD_LOG``: the journal of each process as a file of JSON lines in one folder.

Each process writes its own file. The first line names the process, the last one its state at the end. Between them is
one line for each call site that strayed: at once when it is new, and again when its counts have grown, at most once a
second and at the end. Each line is one write, so a killed process lacks only the counts of its last second. If the
folder is not writable, devguard warns once and the program goes on. ``devguard log DIR`` reads the files
(log_reader.py).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devguard._version import __version__
from devguard.reporting import process_state
from devguard.reporting.journal import journal
from devguard.reporting.rows import Key, Row, format_row
from devguard.support import notices, process_exit
from devguard.support.notices import warn_user
from devguard.support.redaction import redact_command

__all__ = ["start", "SUFFIX"]

SUFFIX = ".jsonl"
FLUSH_INTERVAL_S = 1.0


class _Log:
    """The log file of this process.

    Attributes
    ----------
    where : str or None
        The path of the file, or why it cannot be written; None before the first attempt.
    """

    def __init__(self, folder: Path, last_look: Callable[[str], None]) -> None:
        self.folder = folder
        self._last_look = last_look
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._descriptor = -1
        self._rows = 0
        self._numbers: dict[Row, int] = {}  # each row that was written -> its number in the file
        self._grown: dict[Row, Key] = {}
        self._flushed = 0.0
        self._broken = False
        self.where: str | None = None

    def restart(self) -> None:
        """Forget the rows, after the journal was cleared. In a forked child, start a new file."""
        if self._pid != os.getpid():
            if self._descriptor >= 0:
                os.close(self._descriptor)  # the parent's file
            self._reset()
            process_exit.register(self.stop)
        else:
            self.flush()
        self._numbers.clear()
        self._grown.clear()

    def note(self, key: Key, row: Row) -> None:
        """Write a new row at once, and a row that has grown at the next flush. Called under the journal's lock."""
        if row in self._numbers:
            self._grown[row] = key
            if time.monotonic() - self._flushed >= FLUSH_INTERVAL_S:
                self.flush()
        else:
            self._numbers[row] = self._rows
            self._rows += 1
            self._write_row(key, row)

    def flush(self) -> None:
        """Write the rows that have grown."""
        self._flushed = time.monotonic()
        while self._grown:
            row, key = self._grown.popitem()
            self._write_row(key, row)

    def _write_row(self, key: Key, row: Row) -> None:
        self._write({"stray": self._numbers[row], **format_row(key, row, *row.total()).as_dict()})

    def open(self) -> None:
        """Create the file, with the line that names the process."""
        process = {"pid": self._pid, "parent": os.getppid(), "host": socket.gethostname(), "command": _command()}
        ranks = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ}
        self._write({"process": {**process, **ranks, "time": time.time(), "devguard": __version__}})

    def write_alert(self, text: str) -> None:
        """Write a text of `notices.alert`."""
        self._write({"alert": text, "time": time.time()})

    def _write(self, line: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            if self._descriptor < 0:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                name = f"{socket.gethostname()}-{self._pid}-{time.time_ns()}{SUFFIX}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self.folder / name, flags, 0o600)
                self.where = str(self.folder / name)
                if "process" not in line:
                    self.open()
            os.write(self._descriptor, (json.dumps(line, default=str) + "\n").encode())
        except OSError as error:
            self._broken = True
            self.where = f"devguard cannot write its log to {self.folder}: {error.strerror}."
            warn_user(f"{self.where} Strays are kept in memory only.")

    def stop(self) -> None:
        """Write the remaining rows and the state of the process at its end, and close the file."""
        process_exit.forget(self.stop)
        if self._pid != os.getpid():
            return
        end: dict[str, Any] | None = None
        try:
            self._last_look("at the end of the process")  # may find a last stray
            end = {"time": time.time(), **process_state.describe()}
        finally:
            journal.detach_log()
            notices.stop_on_alert(self.write_alert)
            if end is not None:
                self._write({"end": end})
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor, self._broken = -1, True


def _command() -> str:
    """Return the command line of the interpreter, which `multiprocessing` children have as well, without secrets."""
    return redact_command(getattr(sys, "orig_argv", sys.argv))


def start(folder: Path, last_look: Callable[[str], None]) -> None:
    """Write the journal of this process to a file in `folder` from now on, until the process ends.

    Parameters
    ----------
    folder : Path
        The folder; created if it does not exist.
    last_look : callable
        ``last_look(when)`` looks for strays that no door has reported yet; called once, at the end.
    """
    log = _Log(folder, last_look)
    log.open()
    journal.attach_log(log)
    for text in notices.alerts():
        log.write_alert(text)
    notices.on_alert(log.write_alert)
    process_exit.register(log.stop)
