"""What a thread, or a task of a pool, takes over from the code that starts it; for the door ``threads``.

This module plans, on the thread that starts; thread_run.py runs, on the thread that was started.
"""

from __future__ import annotations

import multiprocessing.pool
import sys
import threading
from concurrent.futures import thread as futures
from dataclasses import dataclass
from typing import Any

from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import Entry, ScopePolicy, local
from devguard.reporting.journal import MAX_ROWS
from devguard.reporting.verdict import judge, judged_here
from devguard.support import callsite
from devguard.support.notices import Failures

__all__ = [
    "ADVICE",
    "failures",
    "Inherited",
    "judge_placement",
    "NAME",
    "plan",
    "plan_thread",
    "plan_worker",
    "planned",
    "Start",
]

NAME = "threads"  # the door

failures = Failures(StrayDeviceError, StrayDeviceWarning)
ADVICE = (
    "A new thread starts on device 0. Decorate its function with devguard.guard(...), give a pool an initializer that "
    "sets the device, or let devguard set it (mode='repair', or doors={'threads': 'repair'})."
)


class Inherited:
    """A scope that was taken over: the policy of the original, which this thread cannot leave."""

    __slots__ = ("mode_of", "names", "requests")

    def __init__(self, original: ScopePolicy) -> None:
        self.mode_of = original.mode_of
        self.requests = original.requests
        self.names = original.names


@dataclass(slots=True, eq=False)
class Start:
    """What a thread or a task takes over when it starts.

    Attributes
    ----------
    entries : tuple of Entry
        The scopes.
    device : int
        The device to set; -1 for none.
    origin : Origin or None
        Where it was started, if it is judged later: a task of a worker that may have selected a device, or
        work that is only observed.
    observed : bool
        Whether it starts as torch starts it, and is judged by what it did.
    """

    entries: tuple[Entry, ...]
    device: int
    origin: callsite.Origin | None = None
    observed: bool = False


# identity of a thread that runs, or is about to -> what it starts with
planned: dict[int, Start] = {}


def plan_thread(thread: threading.Thread, key: Any, code: Any) -> Start | None:
    """Plan the start of a thread, and remember the plan under `key` where it depends on nothing else.

    Parameters
    ----------
    thread : threading.Thread
        The thread.
    key : tuple or None
        The thread's class, the identity of its target's code object, and the code object and instruction of the call
        that starts it; None if they are unknown.
    code : code object or None
        The target's code object; it is kept, so that its identity stays its own.

    Returns
    -------
    Start or None
        None to leave the thread alone.
    """
    work: Any = type(thread).run
    if work is threading.Thread.run:
        work = getattr(thread, "_target", None)
        if work is futures._worker or work is multiprocessing.pool.worker:  # type: ignore[attr-defined]
            return plan_worker()  # a worker outlives the scope in which it happens to start
        is_known = code is not None
    elif work is threading.Timer.run:
        work, is_known = thread.function, False  # type: ignore[attr-defined]
    else:
        is_known = True
    judged = judged_here()
    start = plan(work, 0)
    owner = in_force.owner()
    adopts = not local.stack and process.adoption is not None  # an adoption must see each stray
    if not is_known or key is None or adopts or start is None or start is not judged.start or owner is None:
        return start
    is_recorded = owner.index > 0 and callsite.runs_user_code(work)
    repeat = judged.rows.get((NAME, "cuda:0", owner.tag, owner.tag, *key[2:])) if is_recorded else None
    if repeat is not None or not is_recorded:
        starts = local.stack.starts
        if len(starts) >= MAX_ROWS:
            starts.clear()
        starts[key] = start, judged.top, judged.era, repeat, code
    return start


def plan(work: Any, default: int | None) -> Start | None:
    """Plan the start of `work`.

    Parameters
    ----------
    work : callable
        The function that the thread or task runs.
    default : int or None
        The device on which it would start without devguard; None if that is unknown before it runs.

    Returns
    -------
    Start or None
        None to leave it alone.
    """
    owner = in_force.owner_at_door(uses_gpu=False)
    judged = judged_here()
    start: Start | None = judged.start
    if start is None:
        entries = tuple([(Inherited(scope), scope_owner, -1) for scope, scope_owner, _ in local.stack])
        start = judged.start = Start(entries, -1 if owner is None else owner.index)
    if owner is None:
        return start if start.entries else None
    mode = judged.mode_of(NAME)
    if mode == "off":
        return Start(start.entries, -1) if in_force.mode_of("") == "off" else None
    index = owner.index
    if index < 0:
        return start
    if mode not in ("repair", "error"):
        if index == default or not callsite.runs_user_code(work):
            return Start(start.entries, -1)
        return Start(start.entries, -1, callsite.origin_of(sys._getframe(1)), True)
    if default is None:
        return Start(start.entries, index, callsite.origin_of(sys._getframe(1)))
    if index == default or not callsite.runs_user_code(work) or judge_placement(owner, default):
        return start
    return Start(start.entries, -1)


def judge_placement(owner: Owner, default: int, origin: callsite.Origin | None = None) -> bool:
    """Judge work that would start on the device `default`; return whether to place it on the owner's device."""
    return judge(NAME, f"cuda:{default}", owner, 0, ADVICE, owner.tag, sys._getframe(1), origin=origin, places=True)


def plan_worker() -> Start | None:
    """Plan the start of a pool's worker: it takes over only the owner of the process."""
    if process.owner is None or process.owner.index < 0:
        return None
    mode = process.mode_of(NAME)
    return Start((), process.owner.index) if mode in ("repair", "error") else None
