"""What a thread, or a task of a pool, takes over from the code that starts it; for the door ``threads``.

This module plans, on the thread that starts; thread_run.py runs, on the thread that was started.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import Entry, ScopePolicy, Stack, local
from devguard.reporting.advice import OR_REPAIR, advise
from devguard.reporting.journal import MAX_ROWS
from devguard.reporting.verdict import count_repeat, judge, judged_here
from devguard.support import callsite
from devguard.support.notices import Failures

__all__ = [
    "ADVICE",
    "at_site",
    "failures",
    "Inherited",
    "is_worker",
    "judge_placement",
    "keep",
    "NAME",
    "plan",
    "plan_quietly",
    "plan_thread",
    "plan_worker",
    "planned",
    "recall",
    "Start",
    "WORKERS",
]

NAME = "threads"  # the door

failures = Failures(StrayDeviceError, StrayDeviceWarning)
ADVICE = f"{advise(NAME)} {OR_REPAIR}"


class Inherited:
    """A scope that was taken over: the policy of the original, which this thread cannot leave.

    Attributes
    ----------
    entry, home : Entry, weak reference to Stack
        The original entry, and the stack on which it was entered.
    """

    __slots__ = ("entry", "home", "mode_of", "names", "requests")

    def __init__(self, entry: Entry, stack: Stack) -> None:
        original: ScopePolicy = entry[0]
        self.entry: Entry = original.entry if isinstance(original, Inherited) else entry
        self.home: weakref.ref[Stack] = original.home if isinstance(original, Inherited) else weakref.ref(stack)
        self.mode_of = original.mode_of
        self.requests = original.requests
        self.names = original.names

    def is_in_force(self) -> bool:
        """Return whether the original is still entered on its own thread."""
        home = self.home()
        if home is None:
            return False
        return any(entry is self.entry for entry in (*home, *home.hidden))


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
    restores : bool
        Whether a task gives the worker's device back.
    site : Origin or None
        Where it was started, for strays of work that has no line of user code: ``Thread(target=torch.load)``.
    hides : bool
        Whether a task without scopes leaves those of its thread.
    """

    entries: tuple[Entry, ...]
    device: int
    origin: callsite.Origin | None = None
    observed: bool = False
    restores: bool = False
    site: callsite.Origin | None = None
    hides: bool = False


# Threads of libraries that outlive the scope in which they happen to start: module and qualified name of what they run.
WORKERS = {
    ("anyio._backends._asyncio", "WorkerThread.run"),
    ("concurrent.futures.thread", "_worker"),
    ("multiprocessing.pool", "worker"),
}

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
        The target's code object.

    Returns
    -------
    Start or None
        None to leave the thread alone.
    """
    definer = _definer_of_run(thread)
    if definer == "Thread":
        work: Any = getattr(thread, "_target", None)
        key = None if code is None else key
    elif definer == "Timer":
        work, key = thread.function, None  # type: ignore[attr-defined]
    else:
        work = type(thread).run
    if is_worker(work):
        return plan_worker()
    start = plan(work, 0)
    return start and keep(key, at_site(start, work, sys._getframe(1)), work, code, 0)


def _definer_of_run(thread: threading.Thread) -> str:
    """Return the name of the class in ``threading`` that defines `run`, empty if a subclass does.

    Neither the methods nor ``threading.Timer`` can be compared: a tracer's wrapper of a method is a new object at each
    look-up, and may stand in the place of the class.
    """
    definer = next(kind for kind in type(thread).__mro__ if "run" in vars(kind))
    return definer.__qualname__ if definer.__module__ == threading.__name__ else ""


def recall(stack: Stack, key: Any) -> Start | None:
    """Return the plan that `keep` remembered, counted once more, if it is still valid."""
    known = stack.starts.get(key)
    if (
        known is None
        or known[1] is not (stack[-1] if stack else None)
        or known[2] is not process.era
        or stack.judged is None
        or stack.changes
    ):
        return None
    start: Start
    start, _, _, repeat, _ = known
    if repeat is not None:
        count_repeat(repeat, 0)
    return start


def keep(key: Any, start: Start, work: Any, code: Any, default: int) -> Start:
    """Remember a plan under `key` if it depends on nothing else; return the plan.

    Parameters
    ----------
    key : tuple or None
        The plan is for each start with an equal key. It ends with the code object, by identity, and the instruction of
        the call; None if the plan must not be remembered.
    start, work, default : Start, callable, int
        As for `plan`.
    code : code object or None
        The code object of `work`; it is kept, so that its identity stays its own.
    """
    owner, judged = in_force.owner(), judged_here()
    usual: Start | None = judged.start
    if (
        key is None
        or owner is None
        or usual is None
        or (not local.stack and process.adoption is not None)  # an adoption must see each stray
        or (start.entries, start.device, start.origin) != (usual.entries, usual.device, None)
        or (start.site is not None and id(start.site.code) != key[-2])  # a library starts it for several lines
    ):
        return start
    is_recorded = owner.index >= 0 and owner.index != default and callsite.runs_user_code(work)
    repeat = judged.rows.get((NAME, f"cuda:{default}", owner.tag, owner.tag, *key[-2:])) if is_recorded else None
    if repeat is not None or not is_recorded:
        starts = local.stack.starts
        if len(starts) >= MAX_ROWS:
            starts.clear()
        starts[key] = start, judged.top, judged.era, repeat, code
    return start


def at_site(start: Start, work: Any, caller: FrameType) -> Start:
    """Return `start` with its call site, if strays of `work` would have no line of user code."""
    return start if callsite.has_user_code(work) else replace(start, site=callsite.origin_of(caller))


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
        stack = local.stack
        entries = tuple([(Inherited(entry, stack), entry[1], -1) for entry in stack])
        index = -1 if owner is None else owner.index
        start = judged.start = Start(entries, index, restores=bool(entries) and index < 0)
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


def plan_quietly() -> Start | None:
    """Plan the start of a callback or an initializer in the scopes of this thread, without a verdict."""
    return plan(None, 0) if local.stack else None  # what runs no user code is placed without a record


def is_worker(work: Any) -> bool:
    """Return whether a thread runs the loop of a pool that is known to outlive the scope in which the thread starts."""
    work = getattr(work, "__func__", work)
    return (getattr(work, "__module__", None), getattr(work, "__qualname__", None)) in WORKERS


def plan_worker() -> Start | None:
    """Plan the start of a pool's worker: it takes over only the owner of the process."""
    if process.owner is None or process.owner.index < 0:
        return None
    mode = process.mode_of(NAME)
    return Start((), process.owner.index) if mode in ("repair", "error") else None
