"""Reports progress on standard error while an overlay is built.

A terminal shows a bar; elsewhere one plain line is written at the start of each step. The bar follows the free space of
the disk, which is cheap to read and accurate enough for a bar.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from devguard.support.notices import print_error

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Reporter"]

POLL_SECONDS = 0.2


class Reporter:
    """Reports the steps of one build.

    Parameters
    ----------
    enabled : bool
        Whether to write anything.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Write one line."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(f"devguard: {text}", highlight=False, markup=False, soft_wrap=True)
        else:
            print_error(f"devguard: {text}")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Show a bar inside the block, if standard error is a terminal."""
        if not self._enabled or sys.stderr is None or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def run(self, process: subprocess.Popen[bytes], text: str, folder: Path, expected: int) -> int:
        """Wait for a process that writes about ``expected`` bytes to the disk of ``folder``; return its exit status."""
        if self._bar is None:
            self.say(text)
            return process.wait()
        before = shutil.disk_usage(folder).free
        written = 0
        task = self._bar.add_task(text, total=expected)
        while True:
            try:
                status = process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                written = max(written, before - shutil.disk_usage(folder).free)  # pip also deletes files
                self._bar.update(task, completed=min(written, expected * 99 // 100))
            else:
                self._bar.update(task, completed=expected)
                return status
