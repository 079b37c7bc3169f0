"""The verdict on one stray: what a door does with the stray, and the record of it.

The verdict follows the mode in force. Work on an allowed device is no stray; see allowlist.py.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.modes import REPAIRING, DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.ownership.process import process
from devguard.ownership.stack import Entry, local, stacks
from devguard.reporting import allowlist
from devguard.reporting.journal import MAX_ROWS, journal
from devguard.reporting.rows import Row, Tally
from devguard.reporting.stray import LEFT, Action, Occurrence
from devguard.support import callsite
from devguard.support.callsite import INTERNAL, Frame, Origin, Site
from devguard.support.notices import warn_user

__all__ = [
    "judge",
    "judge_too_late",
    "Judged",
    "judged_here",
    "NAMED_BY_PROGRAM",
    "obey",
    "refusal",
]

NAMED_BY_PROGRAM = (
    "The program names that device itself, and devguard never overrides that. Correct it there (map_location=, "
    "device=, device_ids=), or allow it with devguard.unguarded()."
)


# The verdict on a stray, kept for the next stray like it on the same thread: whether the door repairs it, where this
# thread counts it without a lock (None if a log file must see each one), and its row in the journal.
Repeat = tuple[bool, "Tally | None", Row]
# door, source, owner, target, code object and instruction of the call site
RepeatKey = tuple[str, str, str, "str | None", int, int]


class Judged:
    """The verdicts of one thread under its innermost scope, so that the next stray like one of them costs little.

    A verdict also depends on the outer scopes, which lie under the same entry, and on the process's settings, the
    allow-list and the journal, for which `era` stands. The call site is part of the key.
    """

    __slots__ = ("era", "modes", "rows", "start", "top")

    def __init__(self, top: Entry | None, era: object) -> None:
        self.top = top
        self.era = era
        self.modes: dict[str, DoorMode] = {}
        self.start: Any = None  # what threads started here take over; doors/concurrency/thread_plan.py keeps it
        self.rows: dict[RepeatKey, Repeat] = {}

    def mode_of(self, door: str) -> DoorMode:
        """Return `in_force.mode_of`, remembered."""
        mode = self.modes.get(door)
        if mode is None:
            mode = self.modes[door] = in_force.mode_of(door)
        return mode

    def keep(self, key: RepeatKey, repairs: bool, row: Row) -> None:
        """Keep the verdict on a stray for the next stray like it."""
        if len(self.rows) >= MAX_ROWS:
            self.rows.clear()  # one line can hold many instructions
        self.rows[key] = repairs, journal.tally(row, id(local.stack), _living_stacks), row


def count_repeat(repeat: Repeat, nbytes: int) -> None:
    """Count one more stray like the one that `repeat` was kept for."""
    _, tally, row = repeat
    if tally is None:
        journal.grow(row, nbytes)
    else:
        tally.count += 1
        tally.bytes += nbytes


def _living_stacks() -> set[int]:
    return set(map(id, stacks()))


def judged_here() -> Judged:
    """Return the verdicts of this thread under its innermost scope."""
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

    The arguments become one `Occurrence` only for the first stray of its kind: a repeated stray, in the middle of a
    load, costs one dictionary look-up.

    Parameters
    ----------
    door : str
        The door.
    source : str
        The device that the stray names, or several, separated by commas.
    owner : Owner
        The owner in force.
    nbytes : int
        Bytes of tensor data; 0 where there are none, or where the number is unknown.
    advice : str
        For the error: what the reader can do.
    target : str, optional
        The device of a repaired stray; None if it cannot be repaired.
    start, dtype, shape, note, origin : optional
        As for `Occurrence`; `start` is the caller by default.
    places : bool
        Whether it is unknown that the work would stray, and a repair copies nothing. Such a repair is recorded as
        ``"placed"``, and the mode ``error`` refuses it only where it is set for this door by name.

    Returns
    -------
    bool
        Whether the door repairs the stray. If not, it leaves the stray as it is.

    Raises
    ------
    StrayDeviceError
        In mode ``error``.
    """
    if start is None:
        start = sys._getframe(1)
    stack = local.stack
    adoption = None if stack else process.adoption
    if adoption is not None:
        adoption.freeze_owner(source)
    judged: Judged | None = stack.judged
    if (  # as in judged_here: this is the hot path of a repair
        judged is None or judged.top is not (stack[-1] if stack else None) or judged.era is not process.era
    ):
        judged = judged_here()
    frame: FrameType | None = start
    while frame is not None and id(frame.f_code) in INTERNAL:
        frame = frame.f_back
    # The instruction, not the line: the line is looked up in a table.
    place = (0, 0) if frame is None else (id(frame.f_code), frame.f_lasti)
    key = (door, source, owner.tag, target, *place)
    known = judged.rows.get(key)
    if known is not None and origin is None:
        repairs, tally, row = known
        if tally is None:  # as in count_repeat, a call of which takes a tenth of the time of a repeated verdict
            journal.grow(row, nbytes)
        else:
            tally.count += 1
            tally.bytes += nbytes
        return repairs
    if adoption is not None:
        adoption.look_for_named_work()
        judged = judged_here()  # The look may have demoted the owner.
    occurrence = Occurrence(door, source, owner.tag, nbytes, start, dtype, shape, note, origin)
    repairs, entered = _judge_first(occurrence, advice, target, places, judged)
    if adoption is not None and not repairs:
        adoption.note_stray(source)
    # Kept only where no module is allowed a device: one code object may run in several modules.
    is_repeatable = origin is None and frame is not None and callsite.is_user(frame.f_code)
    if entered is not None and is_repeatable and allowlist.is_empty():
        judged.keep(key, repairs, entered)
    return repairs


def _judge_first(
    occurrence: Occurrence, advice: str, target: str | None, places: bool, judged: Judged
) -> tuple[bool, Row | None]:
    """Decide about a stray that has no verdict yet; return whether to repair it, and its row in the journal."""
    mode = judged.mode_of(occurrence.door)
    if mode == "off" or allowlist.are_allowed(occurrence.source):
        return False, None
    if mode == "observe" and process.adoption is not None and not local.stack:
        process.adoption.report_limit()
    if mode == "error" and places and not in_force.is_named(occurrence.door):
        mode = "repair"
    if mode == "error":
        raise refusal(occurrence, advice)
    if mode not in REPAIRING or target is None:
        return False, _enter(occurrence, LEFT.get(mode, "observed"))[1]
    action: Action = "placed" if places else "repaired"
    return True, _enter(occurrence, action, target)[1]


def judge_too_late(occurrence: Occurrence, mode: DoorMode) -> None:
    """Record a stray that was found afterwards, so that no mode can repair or refuse it."""
    if occurrence.start is None and occurrence.origin is None:
        occurrence = occurrence._replace(start=sys._getframe(1))
    _enter(occurrence, LEFT.get(mode, "observed"), level=3)


def obey(door: str, tag: str, owner: Owner, nbytes: int = 0, start: FrameType | None = None) -> None:
    """Record a device that the program names itself, away from the owner.

    Parameters
    ----------
    door : str
        The door.
    tag : str
        The device, or several, separated by commas.
    owner : Owner
        The owner in force.
    nbytes : int
        Bytes of tensor data.
    start : frame, optional
        As for `Occurrence`; the caller by default.

    Raises
    ------
    StrayDeviceError
        In mode ``error``.
    """
    mode = in_force.mode_of(door)
    if mode == "off" or allowlist.are_allowed(tag):
        return
    occurrence = Occurrence(door, tag, owner.tag, nbytes, sys._getframe(1) if start is None else start)
    if mode == "error":
        raise refusal(occurrence, NAMED_BY_PROGRAM)
    _enter(occurrence, "kept", warns=mode == "warn")


def refusal(occurrence: Occurrence, advice: str, problem: str | None = None) -> StrayDeviceError:
    """Record a stray as refused, and return the error to raise.

    Parameters
    ----------
    occurrence : Occurrence
        The stray, with a start or an origin.
    advice : str
        What the reader can do about it.
    problem : str, optional
        The stray in words; by default what was about to go where.
    """
    site, _ = _enter(occurrence, "refused")
    where = str(Site.of(site)) if site else "no line of user code (see the stack in devguard.strays())"
    if problem is None:
        verb = "were" if occurrence.nbytes else "was"
        problem = f"{occurrence.what} {verb} about to go to {occurrence.source}, but this scope owns {occurrence.owner}"
    return StrayDeviceError(f"{occurrence.door}: {problem}. Call site: {where}. {advice}")


def _enter(
    occurrence: Occurrence, action: Action, target: str | None = None, level: int = 4, *, warns: bool = False
) -> tuple[Frame | None, Row | None]:
    """Record a stray in the journal; if it `warns`, or was warned of, warn once per call site.

    The warning names the line of user code; without one, the door, which is `level` frames out.
    """
    site, row, is_new = journal.enter(occurrence, action, target)
    if is_new and (warns or action == "warned"):
        note = f" ({occurrence.note})" if occurrence.note else ""
        if action == "kept":
            note += " (the program names that device itself)"
        message = (
            f"{occurrence.door}: {occurrence.what} went to {occurrence.source}; this scope owns "
            f"{occurrence.owner}{note}."
        )
        # At the user's line, so that Python's filters apply and the source line is shown.
        at = None if site is None else (site.code.co_filename, site.line)
        warn_user(message, StrayDeviceWarning, at, level)
    return site, row
