"""Child processes of transport tests: programs that run to their end, and what a process holds."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

BOUND_S = 60.0

PRELUDE = """
import gc, os, pickle, signal, sys, threading, time
from devguard import transport
from tests.helpers.transport_children import await_that, descriptors, few_descriptors, maps
handles = [pickle.loads(bytes.fromhex(text)) for text in sys.argv[1:]]
"""


def run(code: str, *arguments: str, before: Sequence[str] = (), data: bytes = b"") -> str:
    """Run a program that imports no torch; return what it prints.

    Parameters
    ----------
    code : str
        The program, which can use the names of `PRELUDE`.
    arguments : str
        The rest of its command line.
    before : sequence of str
        A command that runs Python, such as ``("unshare", "-n")``.
    data : bytes
        Its standard input.
    """
    done = subprocess.run(
        [*before, sys.executable, "-c", PRELUDE + code, *arguments],
        input=data,
        capture_output=True,
        cwd=ROOT,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@contextlib.contextmanager
def started(code: str, *arguments: str, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Start such a program; it is killed at the end. Its standard input and output are pipes."""
    command = [*before, sys.executable, "-uc", PRELUDE + code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[bytes], line: str = "") -> None:
    """Write a line to a process."""
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


def hear(process: subprocess.Popen[bytes]) -> str:
    """Return the next line of a process; empty at its end."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([process.stdout], [], [], BOUND_S)[0], "the process does not answer"
        read = process.stdout.read(1)
        if not read:
            break
        line += read
    return line.decode().strip()


def encode(handle: Any) -> str:
    """Return a handle as an argument of such a program, where ``pickle.loads(bytes.fromhex(...))`` reads it."""
    return pickle.dumps(handle).hex()


def is_allowed(*command: str) -> bool:
    """Return whether this machine runs a command, such as unshare with its options."""
    try:
        return subprocess.run([*command, "true"], capture_output=True, timeout=BOUND_S, check=False).returncode == 0
    except FileNotFoundError:
        return False


def await_that(holds: Callable[[], Any]) -> None:
    """Wait until something holds; fail if it does not within the bound."""
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def descriptors() -> set[str]:
    """Return what the descriptors of this process are."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return {text for text in found if not text.endswith("/fd")}


def maps() -> int:
    """Return how many maps of arenas this process has."""
    with open("/proc/self/maps") as file:
        return sum("devguard-transport" in line for line in file)


@contextlib.contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Leave room for `free` further descriptors in this process."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    fill = [os.dup(0)]
    while fill[-1] < highest:  # no holes below the limit
        fill.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fill[-1] + 1 + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number in fill:
            os.close(number)
