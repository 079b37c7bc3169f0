"""The cost of the doors bookkeeping, set_device and streams without a stray.

On simulated GPUs the calls themselves take almost no time (an ``empty_cache`` 0.2 us), so the ratios are worst there;
on a real GPU the calls take micro- to milliseconds. A separate row shows the cost of any Python function around the
shortest call: no door that checks before each call can be faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import devguard
from benchmarks.measure import Row, Run, compare
from benchmarks.states import INSTALLED, OWNER, STATES, guarded, plain


def _changes() -> None:
    torch.cuda.set_device(1 - OWNER)
    torch.cuda.set_device(OWNER)


def _empty_what_was_cached() -> None:
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")  # Freed at once, and cached.
    torch.cuda.empty_cache()


def bookkeeping() -> list[Row]:
    """Time calls that name no device, on the owner: inside a guard, and in a process with an owner."""
    torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1")
    calls: dict[str, tuple[Callable[[], Any], float | None]] = {
        "torch.cuda.synchronize()": (lambda: torch.cuda.synchronize(), 1.10),
        "torch.cuda.mem_get_info()": (lambda: torch.cuda.mem_get_info(), 1.10),
        "torch.cuda.memory_allocated()": (lambda: torch.cuda.memory_allocated(), 1.10),
        "torch.cuda.empty_cache(), nothing cached": (lambda: torch.cuda.empty_cache(), None),
        "torch.empty of 1 MB, then empty_cache()": (_empty_what_was_cached, 1.10),
        "torch.cuda.current_stream()": (lambda: torch.cuda.current_stream(), 1.10),
        "torch.cuda.Stream()": (lambda: torch.cuda.Stream(), None),
        "torch.cuda.Event()": (lambda: torch.cuda.Event(), None),
        "set_device, the owner's": (lambda: torch.cuda.set_device(OWNER), None),
        "set_device, another one and back": (_changes, None),
    }
    rows = [compare("torch.cuda.empty_cache(), through a function that does nothing else", *_passing_on(), None)]
    for what, (call, budget) in calls.items():
        rows.append(compare(f"{what} in a guard", plain(call), guarded(call), budget, **STATES))
        rows.append(compare(f"{what} under install()", plain(call), plain(call), budget, **INSTALLED))
    devguard.uninstall()
    return rows


def _passing_on() -> tuple[Run, Run]:
    """Return a call, and the same call behind the least that a door needs: one look at the thread and one branch."""
    original, local = torch.cuda.empty_cache, threading.local()
    local.stack = None

    def through() -> None:
        if local.stack is None:
            original()

    return plain(lambda: original()), plain(lambda: through())
