"""The program of ``devguard watch -- COMMAND``: it runs guarded, with a log, beside the watcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from devguard.cli.supervisor import End

__all__ = ["Program", "start"]

OUTPUT = "output.txt"


class Program:
    """A program that was started.

    Parameters
    ----------
    process : Popen
        The process.
    output : Path or None
        Where its output goes; None: to the standard streams of this process.
    begun : float
        When it began, in seconds since 1970.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: Path | None, begun: float) -> None:
        self._process = process
        self.output = output
        self.begun = begun
        self.pid = process.pid

    def is_running(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    def pause(self, seconds: float) -> None:
        """Wait for its end, at most for some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def wait(self) -> int:
        """Wait for its end; return its status as a shell gives it. Ctrl-C is passed on, and the program then ends."""
        while True:
            try:
                return End(self.pid, self._process.wait()).status
            except KeyboardInterrupt:
                self.interrupt()

    def interrupt(self) -> None:
        """Pass Ctrl-C on, unless the terminal has done so: a program with a session of its own does not get it."""
        if self.output is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGINT)

    def copy_output(self) -> None:
        """Write what the program has written to standard output."""
        if self.output is not None and sys.stdout is not None:
            sys.stdout.flush()
            with open(self.output, "rb") as file:
                while part := file.read(1 << 16):
                    sys.stdout.buffer.write(part)
            sys.stdout.flush()


@contextlib.contextmanager
def start(command: Sequence[str], folder: Path, *, is_captured: bool, mode: str | None = None) -> Iterator[Program]:
    """Start a program by ``devguard run --log``, and end it at the end of the block if it still runs.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    folder : Path
        Its log folder, which exists.
    is_captured : bool
        Whether its output goes to a file in the folder, because a screen has the terminal.
    mode : str, optional
        The mode of its doors; by default that of ``devguard run``.
    """
    begun = time.time()
    words = [sys.executable, "-m", "devguard", "run", "--log", str(folder), "--record"]
    words += ([] if mode is None else ["--mode", mode]) + ["--", *command]
    if not is_captured:
        process = subprocess.Popen(words)
        output = None
    else:
        output = folder / OUTPUT
        with open(output, "wb") as file:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
    found = Program(process, output, begun)
    try:
        yield found
    except KeyboardInterrupt:  # The program has its Ctrl-C too, and time for what it does then.
        found.interrupt()
        found.wait()
        raise
    finally:
        if found.is_running():
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if is_captured else os.kill)(process.pid, signal.SIGTERM)
            process.wait()
