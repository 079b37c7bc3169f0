"""Start the rank processes, exchange messages with them, and end them, without ever waiting for a dead one."""

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

ANSWER_LIMIT = 180.0  # seconds for one answer; the first one waits for torch to import on a cold, busy machine
EXIT_LIMIT = 10.0  # seconds for a process to exit after the command "stop"


class Crew:
    """Rank processes with a pipe to each; a context manager that ends them all.

    Parameters
    ----------
    ranks : int
        The number of processes.
    entry : callable
        ``entry(link, gpu_id, ranks, meeting)``. It must be importable by name, because the processes are spawned.
    meeting : str
        Passed on to `entry`.
    limit : float
        Seconds to wait for an answer.
    """

    def __init__(
        self,
        ranks: int,
        entry: Callable[[Connection, int, int, str], None],
        meeting: str,
        limit: float = ANSWER_LIMIT,
    ) -> None:
        self._limit = limit
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
                theirs.close()  # Otherwise the pipe would stay open when the process exits.
                self.links.append(ours)
                self.processes.append(process)
        except BaseException:
            self.end(wait_for_exit=False)
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(wait_for_exit=kind is None)

    def send(self, command: str, *ranks: int) -> None:
        """Send `command` to the given ranks, or to all ranks if none is given."""
        for rank in ranks or range(len(self.links)):
            with self.link_to(rank) as link:
                link.send(command)

    @contextlib.contextmanager
    def link_to(self, rank: int) -> Iterator[Connection]:
        """Yield the pipe to `rank`; turn a broken pipe into an error that reports how the rank ended."""
        try:
            yield self.links[rank]
        except (BrokenPipeError, ConnectionResetError):
            raise DemoError(self._describe_exit(rank)) from None

    def gather(self, expected: str) -> list[Any]:
        """Wait for one answer from each rank.

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
            If a rank fails, dies, or does not answer in time.
        """
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._limit
        while len(answers) < len(self.links):
            waiting = {self.links[rank]: rank for rank in range(len(self.links)) if rank not in answers}
            # The pipe of a dead rank is ready too.
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(f"rank {rank}" for rank in waiting.values())
                raise DemoError(
                    f"no {expected} within {self._limit:g} s from: {silent}. The machine may be overloaded."
                )
            for link in ready:
                rank = waiting[link]  # type: ignore[index]
                try:
                    kind, content = self.links[rank].recv()
                except (EOFError, OSError):
                    raise DemoError(self._describe_exit(rank)) from None
                if kind != expected:
                    raise DemoError(f"rank {rank} failed.\n{content}".rstrip() + self._describe_other_exits(rank))
                answers[rank] = content
        return [answers[rank] for rank in range(len(self.links))]

    def end(self, wait_for_exit: bool = True) -> None:
        """Send "stop" to all processes, wait for them to exit if `wait_for_exit`, then kill those that still run."""
        for link in self.links:
            with contextlib.suppress(OSError):
                link.send("stop")
            link.close()
        deadline = time.monotonic() + (EXIT_LIMIT if wait_for_exit else 0.0)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for stop in (BaseProcess.terminate, BaseProcess.kill):
            for process in self.processes:
                if process.exitcode is None:
                    stop(process)
                    process.join(EXIT_LIMIT)

    def _describe_exit(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(EXIT_LIMIT)
        return (
            f"rank {rank} (pid {process.pid}) ended before it answered: {_describe_status(process.exitcode)}."
            + self._describe_other_exits(rank)
        )

    def _describe_other_exits(self, rank: int) -> str:
        exits = [
            f"rank {other}: {_describe_status(process.exitcode)}"
            for other, process in enumerate(self.processes)
            if other != rank and process.exitcode
        ]
        return f" Also ended: {'; '.join(exits)}." if exits else ""


def _describe_status(status: int | None) -> str:
    if status is None:
        return "it closed its pipe but is still running"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
