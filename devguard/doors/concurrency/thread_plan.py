"""What a thread, or a task of a pool, takes over from whoever started it; for the door ``threads``.

It is planned here, on the thread that starts it; running.py is for the thread that runs it.
"""

from __future__ import annotations

import multiprocessing.pool
import sys
import threading
from collections.abc import Callable
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

__all__ = [
    "ADVICE",
    "NAME",
    "Inherited",
    "Start",
    "failures",
    "note",
    "places",
    "plan",
    "plan_thread",
    "plan_worker",
    "planned",
    "safely",
]

NAME = "threads"  # the door

failures: list[str] = []
ADVICE = (
    "A new thread starts on device 0. Decorate its function with devguard.guard(...), give a pool an initializer that "
    "sets the device, or let devguard set it (mode='repair', or doors={'threads': 'repair'})."
)


class Inherited:
    """A scope that was taken over: the policy of the original, which this thread cannot leave."""

    __slots__ = ("asks_for", "mode_of", "names")

    def __init__(self, original: ScopePolicy) -> None:
        self.mode_of = original.mode_of
        self.asks_for = original.asks_for
        self.names = original.names


@dataclass(slots=True, eq=False)
class Start:
    """What a thread or a task takes over from whoever started it.

    Attributes
    ----------
    entries : tuple of Entry
        The scopes.
    device : int
        The device to set; -1 for none.
    origin : Origin or None
        Where it was started, if it is judged later: a task of workers whose device is not known until it runs, or what
        is only observed.
    observed : bool
        Whether it is left as torch starts it, and judged by what it did.
    """

    entries: tuple[Entry, ...]
    device: int
    origin: callsite.Origin | None = None
    observed: bool = False


# id of a thread that runs, or is about to -> what it starts with
planned: dict[int, Start] = {}


def safely(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; a failure of devguard itself is noted and costs no thread its life.

    Verdicts pass: an error of the mode ``error``, and a warning that the program's filters turn into one.
    """
    try:
        return function(*args)
    except (StrayDeviceError, StrayDeviceWarning):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        note(error)
        return None


def note(error: Exception) -> None:
    """Note a failure of devguard itself, for `status`."""
    if len(failures) < 16:
        failures.append(f"{type(error).__name__}: {error}")


def plan_thread(thread: threading.Thread, key: Any, code: Any) -> Start | None:
    """Decide with what a thread starts, and remember it under `key` where that says all that it depends on.

    Parameters
    ----------
    thread : threading.Thread
        The thread.
    key : tuple or None
        Its class, its target's code object by its identity, and the code object and instruction of whoever starts it;
        None where that cannot be told.
    code : code object or None
        Its target's, to keep that identity.

    Returns
    -------
    Start or None
        None to leave it alone.
    """
    work: Any = type(thread).run
    if work is threading.Thread.run:
        work = getattr(thread, "_target", None)
        if work is futures._worker or work is multiprocessing.pool.worker:  # type: ignore[attr-defined]
            return plan_worker()  # it outlives the scope that happens to start it
        sure = code is not None
    elif work is threading.Timer.run:
        work, sure = thread.function, False  # type: ignore[attr-defined]
    else:
        sure = True
    known = judged_here()
    begin = plan(work, 0)
    owner = in_force.owner()
    adopts = not local.stack and process.adoption is not None  # each stray is told to it
    if not sure or key is None or adopts or begin is None or begin is not known.start or owner is None:
        return begin
    recorded = owner.index > 0 and callsite.runs_users(work)
    row = known.rows.get((NAME, "cuda:0", owner.tag, owner.tag, *key[2:])) if recorded else None
    if row is not None or not recorded:
        starts = local.stack.starts
        if len(starts) >= MAX_ROWS:
            starts.clear()
        starts[key] = begin, known.top, known.era, row, code
    return begin


def plan(work: Any, default: int | None) -> Start | None:
    """Decide with what `work` starts.

    Parameters
    ----------
    work : callable
        What is to run.
    default : int or None
        The device on which it would start without devguard; None if nobody knows before it runs.

    Returns
    -------
    Start or None
        None to leave it alone.
    """
    owner = in_force.owner_at_door()
    known = judged_here()
    start: Start | None = known.start
    if start is None:
        entries = tuple([(Inherited(within), its_owner, -1) for within, its_owner, _ in local.stack])
        start = known.start = Start(entries, -1 if owner is None else owner.index)
    if owner is None:
        return start if start.entries else None
    mode = known.mode_of(NAME)
    if mode == "off":
        return Start(start.entries, -1) if in_force.mode_of("") == "off" else None
    index = owner.index
    if index < 0:
        return start
    if mode not in ("repair", "error"):
        if index == default or not callsite.runs_users(work):
            return Start(start.entries, -1)
        return Start(start.entries, -1, callsite.origin(sys._getframe(1)), True)
    if default is None:
        return Start(start.entries, index, callsite.origin(sys._getframe(1)))
    if index == default or not callsite.runs_users(work) or places(owner, default):
        return start
    return Start(start.entries, -1)


def places(owner: Owner, default: int, origin: callsite.Origin | None = None) -> bool:
    """Record that what would start on the device `default` is placed on the owner's; tell whether it is to be."""
    return judge(NAME, f"cuda:{default}", owner, 0, ADVICE, owner.tag, sys._getframe(1), origin=origin, places=True)


def plan_worker() -> Start | None:
    """Decide with what the worker of a pool starts: with the process's owner alone."""
    if process.owner is None or process.owner.index < 0:
        return None
    mode = process.mode_of(NAME)
    return Start((), process.owner.index) if mode in ("repair", "error") else None
