"""The states that rows compare, unguarded, guarded and installed, and how a call is run in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import devguard
from benchmarks.measure import Run

OWNER = 1


def closed() -> None:
    """Close the doors, and make the owner's device current: an unguarded process that did set_device."""
    devguard.uninstall()
    torch.cuda.set_device(OWNER)


def opened() -> None:
    """Open the doors, which takes a millisecond the first time, and choose the device before there is a guard."""
    with devguard.guard(OWNER):
        pass
    torch.cuda.set_device(OWNER)


def installed() -> None:
    """Make the owner that of the whole process, and of no scope."""
    devguard.install(device=OWNER)


STATES = {"before_base": closed, "before_ours": opened}
INSTALLED = {"before_base": closed, "before_ours": installed}


def plain(call: Callable[[], Any]) -> Run:
    """Run `call` as often as asked."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def guarded(call: Callable[[], Any]) -> Run:
    """Run `call` as often as asked, in one guard."""

    def run(times: int) -> None:
        with devguard.guard(OWNER):
            for _ in range(times):
                call()

    return run
