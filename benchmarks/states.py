"""The states that rows compare (unguarded, guarded, installed), and functions to run a call in each state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import devguard
from benchmarks.measure import Run

OWNER = 1


def closed() -> None:
    """Close the doors and make the owner's device current, as in an unguarded process that called set_device."""
    devguard.uninstall()
    torch.cuda.set_device(OWNER)


def opened() -> None:
    """Open the doors, which takes a millisecond the first time, and select the device before the guard."""
    with devguard.guard(OWNER):
        pass
    torch.cuda.set_device(OWNER)


def installed() -> None:
    """Set the owner of the whole process, without a scope."""
    devguard.install(device=OWNER)


STATES = {"before_base": closed, "before_ours": opened}
INSTALLED = {"before_base": closed, "before_ours": installed}


def plain(call: Callable[[], Any]) -> Run:
    """Return a function that repeats `call`."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def guarded(call: Callable[[], Any]) -> Run:
    """Return a function that repeats `call` in one guard."""

    def run(times: int) -> None:
        with devguard.guard(OWNER):
            for _ in range(times):
                call()

    return run
