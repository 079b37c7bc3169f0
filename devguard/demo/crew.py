"""The rank processes seen from the tokenizer: start them, talk to them, never wait for a dead one."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from devguard.demo import DemoError

__all__ = ["Crew"]

PATIENCE = 180.0  # seconds for one answer; importing torch on a cold, busy machine is the slowest of them
FAREWELL = 10.0  # seconds for a process to end after it was asked to


class Crew:
    """N processes, each with a pipe to this one; a context manager that ends them all.

    Parameters
    ----------
    ranks : int
        How many.
    entry : callable
        ``entry(link, gpu_id, ranks, meeting)``, importable by name: the processes are spawned.
    meeting : str
        Passed on to `entry`.
    patience : float
        Seconds to wait for an answer.
    """

    def __init__(
        self,
        ranks: int,
        entry: Callable[[Connection, int, int, str], None],
        meeting: str,
        patience: float = PATIENCE,
    ) -> None:
        self._patience = patience
        self.links: list[Connection] = []
        self.processes: list[BaseProcess] = []
        spawn = multiprocessing.get_context("spawn")
        try:
            for rank in range(ranks):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(
                    target=entry, args=(theirs, rank, ranks, meeting), name=f"rank {rank}", daemon=True
                )
                process.start()
                theirs.close()  # or the end of the process would not end the pipe
                self.links.append(ours)
                self.processes.append(process)
        except BaseException:
            self.end(asked=False)
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(asked=kind is None)

    def tell(self, command: str, *ranks: int) -> None:
        """Send `command` to the named ranks, to all of them if none is named."""
        for rank in ranks or range(len(self.links)):
            with self.watching(rank):
                self.links[rank].send(command)

    @contextlib.contextmanager
    def watching(self, rank: int) -> Iterator[Connection]:
        """Turn a broken pipe to `rank` into an error that says what became of that rank."""
        try:
            yield self.links[rank]
        except (BrokenPipeError, ConnectionResetError):
            raise DemoError(self._obituary(rank)) from None

    def gather(self, expected: str) -> list[Any]:
        """Wait for one answer from every rank.

        Parameters
        ----------
        expected : str
            The kind of answer.

        Returns
        -------
        list
            The answers, by rank.

        Raises
        ------
        DemoError
            If a rank fails, dies, or stays silent for too long.
        """
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._patience
        while len(answers) < len(self.links):
            waiting = {self.links[rank]: rank for rank in range(len(self.links)) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))  # a dead rank's pipe is ready too
            if not ready:
                silent = ", ".join(f"rank {rank}" for rank in waiting.values())
                raise DemoError(
                    f"no {expected} within {self._patience:g} s from: {silent}. The machine may be overloaded."
                )
            for link in ready:
                rank = waiting[link]  # type: ignore[index]
                try:
                    kind, content = self.links[rank].recv()
                except (EOFError, OSError):
                    raise DemoError(self._obituary(rank)) from None
                if kind != expected:
                    raise DemoError(f"rank {rank} failed.\n{content}".rstrip() + self._other_deaths(rank))
                answers[rank] = content
        return [answers[rank] for rank in range(len(self.links))]

    def end(self, asked: bool = True) -> None:
        """End every process: by asking first, if `asked`, then by force."""
        for link in self.links:
            with contextlib.suppress(OSError):
                link.send("stop")
            link.close()
        deadline = time.monotonic() + (FAREWELL if asked else 0.0)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for stop in (BaseProcess.terminate, BaseProcess.kill):
            for process in self.processes:
                if process.exitcode is None:
                    stop(process)
                    process.join(FAREWELL)

    def _obituary(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(FAREWELL)
        return (
            f"rank {rank} (pid {process.pid}) ended before it answered: {_cause(process.exitcode)}."
            + self._other_deaths(rank)
        )

    def _other_deaths(self, rank: int) -> str:
        dead = [
            f"rank {other}: {_cause(process.exitcode)}"
            for other, process in enumerate(self.processes)
            if other != rank and process.exitcode
        ]
        return f" Also ended: {'; '.join(dead)}." if dead else ""


def _cause(status: int | None) -> str:
    if status is None:
        return "it closed its pipe and still runs"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
