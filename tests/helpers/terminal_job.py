"""A shell with one job, on a terminal of its own: ``python -m tests.helpers.terminal_job COMMAND ...``.

It runs the command in the foreground, in a process group of its own, as an interactive shell does. Each time the
job stops, it prints ``[stopped N]`` with the signal, and continues the job in the foreground. At the end it prints
``[ended N]`` with the exit status. `Terminal` is the other end: it types and reads.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.helpers.simulated import ROOT

WAIT_S = 60.0


class Terminal:
    """A terminal on which this shell runs a command.

    Parameters
    ----------
    command : sequence of str
        The command.
    **environment : str
        Variables to set for the command.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self.shown = ""
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.environ |= {"PYTHONPATH": str(ROOT), **environment}
            os.execv(sys.executable, [sys.executable, "-m", "tests.helpers.terminal_job", *command])

    def type(self, keys: bytes) -> None:
        """Type keys, such as ``b"\\x03"`` for Ctrl-C."""
        os.write(self._end, keys)

    def wait_for(self, text: str) -> str:
        """Read until the terminal has shown a text; return what it has shown before, and forget both."""
        end = time.monotonic() + WAIT_S
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._end, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # no process has the terminal open
                    end = 0
        before, _, self.shown = self.shown.partition(text)
        return before

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._end)


def main(command: Sequence[str]) -> None:
    """Be the shell."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execvp(command[0], command)
    while True:
        _, status = os.waitpid(job, os.WUNTRACED)
        os.tcsetpgrp(0, os.getpgrp())
        if not os.WIFSTOPPED(status):
            print(f"[ended {os.waitstatus_to_exitcode(status)}]", flush=True)
            return
        print(f"[stopped {os.WSTOPSIG(status)}]", flush=True)
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)


if __name__ == "__main__":
    main(sys.argv[1:])
