"""What becomes of one stray: the one decision that every door asks for.

A door finds that work is about to go to a device that is not the owner's, and asks here. The answer follows the mode in
force, and the stray is recorded. What is allowed (`allow`) is no stray.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from devguard.modes import REPAIRING, DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import Entry, local, stacks
from devguard.reporting import allowlist
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import MAX_ROWS, journal, refused
from devguard.reporting.rows import Row, Tally
from devguard.reporting.stray import LEFT, Action
from devguard.support import callsite
from devguard.support.callsite import INTERNAL, Origin

__all__ = ["judge", "Judged", "judged_here"]


class Judged:
    """The strays that one thread has judged under its innermost scope, so that the next like them costs little.

    The rest of what a verdict depends on may not have changed either: the scopes further out are under the same entry,
    and `era` stands for what holds outside of scopes, for what is allowed, and for the journal. The call site is part
    of the key.
    """

    __slots__ = ("era", "modes", "rows", "start", "top")

    def __init__(self, top: Entry | None, era: object) -> None:
        self.top = top
        self.era = era
        self.modes: dict[str, DoorMode] = {}
        self.start: Any = None  # what threads take over that are started here; takeover.py keeps it
        # door, source, owner, target, code object and instruction of the call site -> whether to repair it, where this
        # thread counts it, and the row for where it does not
        self.rows: dict[tuple[str, str, str, str | None, int, int], tuple[bool, Tally | None, Row]] = {}

    def mode_of(self, door: str) -> DoorMode:
        """Return what `in_force.mode_of` does."""
        mode = self.modes.get(door)
        if mode is None:
            mode = self.modes[door] = in_force.mode_of(door)
        return mode


def _living() -> set[int]:
    return set(map(id, stacks()))


def judged_here() -> Judged:
    """Return what this thread has judged under its innermost scope."""
    stack = local.stack
    top = stack[-1] if stack else None
    era = process.era
    judged: Judged | None = stack.judged
    if judged is None or judged.top is not top or judged.era is not era:
        judged = stack.judged = Judged(top, era)
        stack.starts = {}
    return judged


def judge(
    door: str,
    source: str,
    owner: Owner,
    nbytes: int,
    advice: str,
    target: str | None = None,
    start: FrameType | None = None,
    dtype: str | None = None,
    shape: Any = None,
    note: str | None = None,
    origin: Origin | None = None,
    places: bool = False,
) -> bool:
    """Decide about one stray, and record it.

    Parameters
    ----------
    door : str
        The door it came through.
    source : str
        The device it names, or several, separated by commas.
    owner : Owner
        Who owns the scope.
    nbytes : int
        Bytes of tensor data; 0 where there are none, or where nobody knows.
    advice : str
        For the error: what the reader can do.
    target : str, optional
        Where a repair would put it; None if it cannot be repaired.
    start, dtype, shape, note, origin : optional
        As for `Journal.enter`, where the door knows them; `start` is the caller by default.
    places : bool
        Whether nobody can know that it would stray, and a repair copies nothing. Such a repair is recorded as
        ``"placed"``, and the mode ``error`` refuses it only where it is set for this door by name.

    Returns
    -------
    bool
        Whether the door is to repair it. If not, it is to be left as it is.

    Raises
    ------
    StrayDeviceError
        In mode ``error``.
    """
    if start is None:
        start = sys._getframe(1)
    stack = local.stack
    if process.adoption is not None and not stack:
        process.adoption.handle()
    judged: Judged | None = stack.judged
    if (  # as judged_here does it: this is the hot path of a repair
        judged is None or judged.top is not (stack[-1] if stack else None) or judged.era is not process.era
    ):
        judged = judged_here()
    frame: FrameType | None = start
    while frame is not None and id(frame.f_code) in INTERNAL:
        frame = frame.f_back
    # the instruction, not the line: the line is looked up in a table
    place = (0, 0) if frame is None else (id(frame.f_code), frame.f_lasti)
    key = (door, source, owner.tag, target, *place)
    known = judged.rows.get(key)
    if known is not None and origin is None:
        repairs, tally, row = known
        if tally is None:
            journal.grow(row, nbytes)
        else:
            tally.count += 1
            tally.bytes += nbytes
        return repairs

    mode = judged.mode_of(door)
    if mode == "off" or (not allowlist.is_empty() and all(map(is_allowed, source.split(",")))):
        return False
    if mode == "error" and places and not in_force.is_named(door):
        mode = "repair"
    if mode == "error":
        raise refused(
            door, source, owner.tag, nbytes, advice, start=start, dtype=dtype, shape=shape, note=note, origin=origin
        )
    repairs = mode in REPAIRING and target is not None
    action: Action = LEFT.get(mode, "observed")
    if repairs:
        action = "placed" if places else "repaired"
    lands = target if repairs and target is not None else source
    _, entered = journal.enter(door, source, lands, owner.tag, action, nbytes, dtype, shape, start, note, origin)
    # not where modules may be allowed: one code object may run in several
    if (
        entered is not None
        and origin is None
        and allowlist.is_empty()
        and frame is not None
        and callsite.is_user(frame.f_code)
    ):
        if len(judged.rows) >= MAX_ROWS:
            judged.rows.clear()  # one line can hold many instructions
        judged.rows[key] = repairs, journal.tally(entered, id(stack), _living), entered
    return repairs
