"""Small entry points of rank processes for the tests, without torch."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection


def echo(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    """Answer each command with the rank and the command."""
    while (command := link.recv()) != "stop":
        link.send(("answer", (gpu_id, command)))


def one_exits(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    if gpu_id == 1:
        os._exit(3)
    echo(link, gpu_id, ranks, meeting)


def one_is_killed(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    if gpu_id == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    echo(link, gpu_id, ranks, meeting)


def one_fails(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    if gpu_id == 1:
        link.send(("failed", "ValueError: no such layer"))
    echo(link, gpu_id, ranks, meeting)


def one_is_silent(link: Connection, gpu_id: int, ranks: int, meeting: str) -> None:
    if gpu_id == 1:
        link.recv()
    echo(link, gpu_id, ranks, meeting)
