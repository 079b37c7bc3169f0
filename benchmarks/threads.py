"""The cost under a guard of starting a thread, and of running a task in a pool of threads.

The figures are processor time of the whole process, because half of the cost of a start falls on the new thread.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import devguard
from benchmarks.measure import Row, Run, compare
from benchmarks.states import OWNER, closed
from devguard.modes import Mode


def _nothing() -> None:
    pass


def _start(times: int) -> None:
    for _ in range(times):
        thread = threading.Thread(target=_nothing)
        thread.start()
        thread.join()


def _start_placed(times: int) -> None:
    """Start a thread whose function is in the standard library, so it is placed without being recorded as a stray."""
    for _ in range(times):
        thread = threading.Thread(target=threading.main_thread)
        thread.start()
        thread.join()


def _set_and_do_nothing() -> None:
    torch.cuda.set_device(OWNER)
    _nothing()


def _start_and_set(times: int) -> None:
    """Do the work of the guard by hand: the thread's function sets the device."""
    for _ in range(times):
        thread = threading.Thread(target=_set_and_do_nothing)
        thread.start()
        thread.join()


def _submit(times: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _ in range(times):
            pool.submit(_nothing).result()


def _nothing_on_the_owner() -> None:
    with torch.cuda.device(OWNER):
        _nothing()


def _submit_by_hand(times: int) -> None:
    """Do the work of the guard by hand: the task sets the device and restores it."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(times):
            pool.submit(_nothing_on_the_owner).result()


def _guarded(run: Run, mode: Mode) -> Run:
    def guarded(times: int) -> None:
        with devguard.guard(OWNER, mode=mode):
            run(times)

    return guarded


def _open(run: Run) -> Run:
    """Return `run` with open doors, but without an owner."""

    def opened(times: int) -> None:
        with devguard.guard("cpu"):
            pass
        run(times)

    return opened


def threads() -> list[Row]:
    """Compare, guarded and unguarded, a thread that is started and joined, and a task of a pool."""
    bare, by_hand = _start, _start_and_set
    placed = _guarded(_start_placed, "repair")

    def against(what: str, base: Run, ours: Run, budget: float | None) -> Row:
        return compare(what, base, ours, budget, before_base=closed, clock=time.process_time_ns)

    rows = [
        against("a thread started, doors open, no owner", bare, _open(bare), 1.05),
        against("a thread placed by the guard, against one that sets its device", by_hand, placed, 1.05),
        against("the same, a thread of the user's, which is recorded", by_hand, _guarded(bare, "repair"), 1.05),
        against("a pool's task, doors open, no owner", _submit, _open(_submit), 1.05),
        against("a pool's task under a guard", _submit, _guarded(_submit, "repair"), None),
        against("the same, against one that takes the device", _submit_by_hand, _guarded(_submit, "repair"), 1.30),
    ]
    devguard.uninstall()
    return rows
