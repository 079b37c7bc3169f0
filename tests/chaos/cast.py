"""What the plan of a round is made of: seats for readers, leases and deliveries, and the processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.processes import Process, Worker


class Fault(Exception):
    """What may not happen."""


@dataclass
class Seat:
    """The place of a reader; another process may take it after a death, or as a successor."""

    name: str | None
    process: Process | None = None
    joins: bool = True
    blurred: bool = False  # its reader has left or was displaced, so that errors of its process are expected


@dataclass
class Delivery:
    """A handle on its way to one seat."""

    lease: Lease
    seat: Seat
    how: str
    hold: float
    lost: bool
    process: Process | None = None
    blob: bytes = b""
    inside: bool = False
    outcome: str = ""
    joined: bool = False  # the arena knew the reader by its name when it died


@dataclass
class Lease:
    """One put."""

    key: int
    nbytes: int
    how: str
    to: Any
    deliveries: list[Delivery] = field(default_factory=list)
    answer: str = ""
    number: int = 0
    cancelled: bool = False
    repeated: bool = False  # more processes may read it than the put counts

    @property
    def is_over(self) -> bool:
        """Whether the arena must end it: each of its readers has finished it, or has died with it."""
        return self.answer == "discarded" or all(map(self._is_over, self.deliveries))

    def _is_over(self, one: Delivery) -> bool:
        if one.outcome == "ok":
            return True
        if one.outcome != "dead":
            return False
        return one.inside or (one.seat.name is not None and not isinstance(self.to, int) and one.joined)


class Crew:
    """The processes, which are used again in the next round if they have survived."""

    def __init__(self, mutant: str | None = None) -> None:
        self.mutant = mutant
        self.idle: dict[str, list[Process]] = {"sender": [], "router": [], "reader": []}

    def take(self, role: type[Worker]) -> Process:
        """Return a process that is free, or a new one."""
        free = self.idle[role.__name__.lower()]
        return free.pop() if free else Process(role, self.mutant)

    def end(self) -> None:
        """Kill all."""
        for process in itertools.chain(*self.idle.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.forget()
