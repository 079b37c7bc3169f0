"""The parent of a program, for ``devguard run --summary``: it starts the program, passes signals on, and waits.

The program stays in the process group of its parent. So a shell sees one job, pipes and the terminal are the program's
as if it ran alone, and what is typed at the terminal (Ctrl-C, Ctrl-Z) reaches the program from the kernel. Signals that
are sent to the parent are passed on. Where the terminal stops the program, the parent stops as well, so that the shell
takes over. Processes that outlive the program are not waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from devguard.cli.program import IGNORED_BY_PYTHON

__all__ = ["End", "run", "signals_held"]

# Not passed on: what this process gets because of its own doing, or of a stop; SIGKILL and SIGSTOP cannot be.
_OWN = {"SIGABRT", "SIGBUS", "SIGCHLD", "SIGFPE", "SIGILL", "SIGKILL", "SIGPIPE", "SIGSEGV", "SIGSTOP", "SIGSYS"}
_OWN |= {"SIGTRAP", "SIGTTIN", "SIGTTOU"}
_PASSED = signal.valid_signals() - {getattr(signal, name) for name in _OWN}
# The kernel sends these to the whole process group of the terminal, so that the program has them already.
_TYPED = {signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH}
_JOB_STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

SI_KERNEL = 0x80  # siginfo: the kernel sent it; see sigaction(2)
POLL_S = 1.0  # another thread of this process may take SIGCHLD


class End(NamedTuple):
    """How a program ended.

    Attributes
    ----------
    pid : int
        Its process.
    code : int
        Its exit status, or the signal that killed it as a negative number.
    """

    pid: int
    code: int

    @property
    def status(self) -> int:
        """The exit status as a shell gives it: 128 and the number of the signal for a program that was killed."""
        return self.code if self.code >= 0 else 128 - self.code


@contextlib.contextmanager
def signals_held() -> Iterator[set[int]]:
    """Hold signals back during the block, so that none ends this process before it has cleaned up.

    At the end of the block, those that came during it and that `run` did not take act as ever. Yields the signals that
    were held back before.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED | {signal.SIGCHLD})
    try:
        yield {int(each) for each in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(path: str, program: list[str], environment: Mapping[str, str], held_before: set[int]) -> End:
    """Run a program to its end, inside `signals_held`, and return how it ended.

    Its standard streams are those of this process.

    Parameters
    ----------
    path : str
        The file to execute.
    program : list of str
        The name of the program and its arguments.
    environment : mapping of str to str
        Its environment.
    held_before : set of int
        What `signals_held` yields: the signals that the program starts with held back.

    Raises
    ------
    OSError
        If the program cannot be started.
    """
    child = os.posix_spawn(path, program, environment, setsigmask=held_before, setsigdef=IGNORED_BY_PYTHON)
    end = End(child, _wait(child))
    while signal.sigtimedwait(_PASSED, 0) is not None:
        pass  # they were for the program, such as the Ctrl-C that ended it
    return end


def _wait(child: int) -> int:
    """Wait for the end of the program, and return its code."""
    while True:
        changed, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if not changed:
            received = signal.sigtimedwait(_PASSED | {signal.SIGCHLD}, POLL_S)
            if received is not None:
                _pass_on(child, received)
        elif not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        elif os.WSTOPSIG(status) in _JOB_STOPS:
            os.kill(os.getpid(), signal.SIGSTOP)  # until the shell continues the job


def _pass_on(child: int, received: signal.struct_siginfo) -> None:
    number = received.si_signo
    if number == signal.SIGCHLD or (number in _TYPED and received.si_code == SI_KERNEL):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: it runs as another user now
        os.kill(child, number)
