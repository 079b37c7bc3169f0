"""A sample of this process's GPU memory in its log, once a second, while it is watched.

``devguard watch`` touches `WATCHED` in the log folder each second; ``devguard run --record`` leaves `RECORDED` there.
Without one of them a thread only looks, once a second, at the time of a file and for new contexts. It starts when CUDA
is initialised, or with the first arena: before that there is nothing to sample. A sample opens no context and starts no
work on a GPU, and is only written where it differs from the last one.
"""

from __future__ import annotations

import _thread
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devguard.reporting.journal import journal
from devguard.support import accelerator, allocator

__all__ = [
    "add_source",
    "has_subject",
    "INTERVAL_S",
    "RECORDED",
    "remove_source",
    "Sampler",
    "take_sample",
    "WATCHED",
    "WATCHED_S",
]

WATCHED = ".watched"
RECORDED = ".recorded"
INTERVAL_S = 1.0
WATCHED_S = 5.0  # how long a watcher counts after it last touched the file

# What else belongs in a sample: its name, and the functions that return a part as plain data.
_sources: dict[str, list[Callable[[], Any]]] = {}


def add_source(name: str, source: Callable[[], Any]) -> None:
    """Add what `source` returns, plain data, to the list `name` of each sample; it must not raise."""
    _sources.setdefault(name, []).append(source)
    journal.note_state()


def remove_source(name: str, source: Callable[[], Any]) -> None:
    """Undo `add_source`."""
    if source in _sources.get(name, ()):
        _sources[name].remove(source)


def has_subject(state: dict[str, Any]) -> bool:
    """Return whether there is anything to sample in a process with this state (process_state.py)."""
    return bool(state["contexts"]) or accelerator.is_initialized() or any(_sources.values())


def take_sample() -> dict[str, Any]:
    """Return the memory of torch's allocator for each device with a context, and the number of strays; opens nothing.

    Returns
    -------
    dict
        ``memory``: for each device name the bytes allocated and reserved, and the most that were allocated. ``strays``:
        their number so far. The lists of `add_source`, where they are not empty.
    """
    memory = {}
    for index in accelerator.contexts():
        found = allocator.statistics(index)
        allocated, reserved = found.get("allocated_bytes", {}), found.get("reserved_bytes", {})
        memory[f"cuda:{index}"] = [
            _total(allocated, "current"),
            _total(reserved, "current"),
            _total(allocated, "peak"),
        ]
    lists = {name: [source() for source in tuple(sources)] for name, sources in _sources.items() if sources}
    return {"memory": memory, "strays": journal.total, **lists}


def _total(counter: dict[str, dict[str, int]], name: str) -> int:
    return counter.get("all", {}).get(name, 0)


class Sampler:
    """The thread of one process. It ends with `stop`; a forked child has no such thread, and makes its own.

    The thread is started below `threading`, because the first context may be found during a garbage collection, which
    may have interrupted `threading` while it held a lock.

    Parameters
    ----------
    folder : Path
        The log folder.
    write : callable
        Writes a sample to the log; called on the thread, as `tick` is. Neither may raise.
    tick : callable
        Called once a second.

    Raises
    ------
    RuntimeError
        If the system starts no more threads.
    """

    def __init__(self, folder: Path, write: Callable[[dict[str, Any]], object], tick: Callable[[], object]) -> None:
        self._watched = folder / WATCHED
        self._is_recorded = (folder / RECORDED).exists()
        self._write, self._tick = write, tick
        self._last: dict[str, Any] | None = None
        self._goes_on, self._runs = _thread.allocate_lock(), _thread.allocate_lock()
        self._goes_on.acquire()
        self._runs.acquire()
        self.thread = _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            while not self._goes_on.acquire(timeout=INTERVAL_S):
                self.look()
        finally:
            self._runs.release()

    def look(self) -> None:
        """Write a sample if the samples have a reader, unless it is the same as the last one."""
        self._tick()
        if not self.is_watched():
            self._last = None  # A new watcher gets a sample, also if nothing has changed.
            return
        try:
            found = take_sample()
        except Exception:  # noqa: BLE001 - a log must not stop the program, nor fill its output once a second
            return
        if found != self._last:
            self._last = found
            self._write(found)

    def is_watched(self) -> bool:
        """Return whether the samples have a reader."""
        if self._is_recorded:
            return True
        try:
            return abs(time.time() - os.stat(self._watched).st_mtime) < WATCHED_S
        except OSError:
            return False

    def stop(self) -> None:
        """End the thread, and wait until it has."""
        if self._goes_on.locked():
            self._goes_on.release()
            if self.thread != _thread.get_ident():
                self._runs.acquire(timeout=INTERVAL_S)
