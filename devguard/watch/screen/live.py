"""The live screen: looks once an interval, draws with rich, and reads single keys."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from devguard.support.terminal import cut, printable
from devguard.watch.matrix import Matrix, Row
from devguard.watch.screen.spans import Span
from devguard.watch.screen.table import draw

__all__ = ["Screen", "to_text"]

KEPT = 60  # looks that the sparklines show
TAIL = 3  # lines of the program's output
UP, DOWN = ("\x1b[A", "\x1bOA", "k"), ("\x1b[B", "\x1bOB", "j")
_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)  # several may come at once
LEAVE, ENTER = b"\x1b[?25h\x1b[?1049l", b"\x1b[?1049h\x1b[?25l"  # the screen, as rich enters it
KEYS = "q quit   s sort   p pause   up/down and Enter: the lines of one process"

# How the processes are sorted, by turns; the first one is that of the matrix.
ORDERS: dict[str, Callable[[Row], Any] | None] = {
    "owner": None,
    "bytes": lambda row: -sum(cell.bytes or 0 for cell in row.cells.values()),
    "strays": lambda row: -row.strays,
    "pid": lambda row: row.pid,
}


class Screen:
    """What the live screen shows, apart from the terminal.

    Parameters
    ----------
    title : str
        What is watched.
    interval : float
        Seconds between two looks.
    output : Path, optional
        The output of the program that was started, the end of which is shown.
    """

    def __init__(self, title: str, interval: float, output: Path | None = None) -> None:
        self._title, self._interval, self._output = title, interval, output
        self._orders = deque(ORDERS)
        self._chosen: int | None = None  # the process that the cursor is on
        self._is_open = False  # whether its lines are shown
        self._matrix: Matrix | None = None
        self.history: dict[str, deque[int]] = {}
        self.is_paused = False
        self.is_done = False

    def take(self, matrix: Matrix) -> None:
        """Show another matrix, unless the screen is paused."""
        for column in matrix.columns:
            if column.used is not None:
                self.history.setdefault(column.uuid, deque(maxlen=KEPT)).append(column.used)
        if not self.is_paused or self._matrix is None:
            self._matrix = matrix

    def press(self, key: str) -> None:
        """Obey one key; other keys do nothing."""
        if key in ("q", "\x03"):
            self.is_done = True
        elif key == "p":
            self.is_paused = not self.is_paused
        elif key == "s":
            self._orders.rotate(-1)
        elif key in UP + DOWN:
            self._move(-1 if key in UP else 1)
        elif key in ("\r", "\n") and self._chosen is not None:
            self._is_open = not self._is_open

    def _move(self, step: int) -> None:
        """Put the cursor on the next process that has strays, or on the next one of all if none has."""
        rows = self._rows()
        pids = [row.pid for row in rows if row.strays] or [row.pid for row in rows]
        if pids:
            place = pids.index(self._chosen) + step if self._chosen in pids else 0
            self._chosen = pids[place % len(pids)]

    def _rows(self) -> list[Row]:
        rows = list(self._matrix.rows) if self._matrix else []
        key = ORDERS[self._orders[0]]
        return sorted(rows, key=key) if key else rows

    def lines(self, width: int, height: int) -> list[list[Span]]:
        """Return the lines of the screen, at most `height`."""
        matrix = self._matrix
        if matrix is None:
            return [[Span("looking ...", "dim")]]
        clock = time.strftime("%H:%M:%S", time.localtime(matrix.time))
        state = "PAUSED" if self.is_paused else f"+{self._interval:g} s"
        running = sum(row.guarded for row in matrix.rows)
        head = (
            f"{printable(self._title)}   {running} guarded of {len(matrix.rows)} processes, {len(matrix.columns)} GPUs"
        )
        order = ORDERS[self._orders[0]]
        foot = [[Span(cut(f"{KEYS}   (sorted by {self._orders[0]})", width), "dim")]]
        tail = [[Span(cut(printable(line), width), "dim")] for line in self._tail()]
        body = draw(
            matrix,
            width,
            height=height - 3 - len(tail),
            history=self.history,
            order=order,
            chosen=self._chosen,
            details=self._is_open,
        )
        room = max(height - 2 - len(tail), 1)
        return [[Span(cut(f"{head}   {clock}  {state}", width), "bold")], *body[:room], *tail, *foot]

    def _tail(self) -> Sequence[str]:
        """Return the last lines of the program's output."""
        if self._output is None:
            return ()
        with contextlib.suppress(OSError), open(self._output, "rb") as file:
            file.seek(max(os.path.getsize(self._output) - 4096, 0))
            return file.read().decode(errors="replace").splitlines()[-TAIL:]
        return ()

    def run(self, look: Callable[[], Matrix], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Show the screen until `q` is pressed, or `goes_on` returns False.

        Parameters
        ----------
        look : callable
            Returns the matrix of the moment; called once an interval.
        goes_on : callable
            Called before each look.
        """
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with _keys() as read_key, Live(console=console, screen=True, auto_refresh=False) as live:
            while not self.is_done and goes_on():
                due = time.monotonic() + self._interval
                self.take(look())
                live.update(to_text(self.lines(*console.size)), refresh=True)
                while not self.is_done and (left := due - time.monotonic()) > 0:
                    keys = _KEY.findall(read_key(left))
                    for key in keys:
                        self.press(key)
                    if keys:
                        live.update(to_text(self.lines(*console.size)), refresh=True)


def to_text(lines: Sequence[Sequence[Span]]) -> Any:
    """Return lines as one text of rich."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for place, line in enumerate(lines):
        if place:
            text.append("\n")
        for span in line:
            text.append(span.text, style=span.style)
    return text


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Make the terminal pass on each key at once; give a function that waits for one, "" if none comes in time."""
    import termios
    import tty

    descriptor = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    if descriptor is None:

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return

    def read_key(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        return os.read(descriptor, 16).decode(errors="replace") or "q"  # the terminal is gone

    before = termios.tcgetattr(descriptor)

    def give_back() -> None:
        _write(LEAVE)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

    def take_again() -> None:
        tty.setcbreak(descriptor)
        _write(ENTER)

    try:
        tty.setcbreak(descriptor)
        with _stops(give_back, take_again):
            yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _write(sequence: bytes) -> None:
    with contextlib.suppress(OSError):  # A handler of signals must not use a stream that it may have interrupted.
        os.write(sys.__stdout__.fileno(), sequence)  # type: ignore[union-attr]


@contextlib.contextmanager
def _stops(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Call functions before and after Ctrl-Z stops this process; the shell does not restore the modes of a terminal."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        before()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # The kernel ignores it where no shell could continue this process.
        signal.signal(number, stop)
        after()

    signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
