"""`no_strays`: a block in which no work may stray."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from types import CodeType, FrameType, TracebackType

from devguard.doors import table
from devguard.errors import StrayDeviceError, StrayDeviceWarning
from devguard.guards import unwind
from devguard.ownership import in_force
from devguard.ownership.process import forget_past_owners, process
from devguard.ownership.stack import Stack, local, stacks
from devguard.reporting import foreign_memory
from devguard.reporting.journal import journal
from devguard.reporting.stray import Stray
from devguard.support import allocation_history, callsite
from devguard.support.notices import warn_user

__all__ = ["judge_blocks", "no_strays", "renew_blocks"]

_END = "at the end of no_strays()"


class no_strays:
    """A block at the end of which `StrayDeviceError` is raised if work strayed in it, repaired or not.

    Contexts and memory count as well, wherever this process opened or allocated them: also on other threads, and if the
    memory is free again. What came before the block does not count, nor a thread that was placed on the owner's device
    (action ``"placed"``). In the block, torch keeps a history of its allocations, so that the error names their lines.

    Raises
    ------
    StrayDeviceError
        At the end of the block; it names every call site. Not if the block raises another exception.

    Examples
    --------
    >>> with devguard.guard("cuda:1"), devguard.no_strays():
    ...     step()
    """

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def __enter__(self) -> None:
        self._blocks.append(_Block(sys._getframe(1)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block = self._take(unwind.holder_of(sys._getframe(1)))
        try:
            if error is None:
                block.judge()
            else:
                with contextlib.suppress(Exception):  # the block's own exception is on its way
                    block.judge()
        finally:
            block.end()
        if error is None:
            block.raise_for_strays()

    def _take(self, holder: int) -> _Block:
        """Return the newest block that the frame `holder` entered, as in unwind.py; others may share this object."""
        ident, blocks = threading.get_ident(), self._blocks
        here = [block for block in blocks if block.thread == ident]
        plain = [block for block in here if not block.holder]
        # A generator may be closed on another thread. Other frames are left in order, and may be gone.
        own = [block for block in blocks if holder and block.holder == holder] or plain or here or blocks
        self._blocks.remove(own[-1])
        return own[-1]


class _Block:
    """One entered block: what was there when it was entered.

    Attributes
    ----------
    thread : int
        The thread that entered it.
    holder : int
        The generator or coroutine frame that entered it; 0 for any other frame.
    """

    def __init__(self, frame: FrameType) -> None:
        self.thread, self._pid = threading.get_ident(), os.getpid()
        self.holder = unwind.holder_of(frame)
        caller = unwind.caller_of(frame) or frame
        self._code, self._line = caller.f_code, (caller.f_code.co_filename, caller.f_lineno)
        self._stack = local.stack
        in_force.owner_at_door()  # a change of the device that was not undone came before
        table.look("before no_strays()")
        # Otherwise a GPU that had an owner once would be owned for ever. Owners that the block enters are owned in it.
        self._past_owners = forget_past_owners()
        table.accept_contexts(owner.index for owner in self._past_owners)
        self._mark = journal.mark()
        self._picture = foreign_memory.take_picture()
        self._before = set(self._picture.contexts)
        allocation_history.record(self)
        _blocks.append(self)

    def judge(self) -> None:
        """Record what the doors have not seen: memory, contexts and device changes since the block was entered."""
        if process.adoption is not None:
            process.adoption.freeze_owner()  # a guess counts here, since the program requests the check
        # The strays are in the journal now, and the block raises for all of them.
        with contextlib.suppress(StrayDeviceError, StrayDeviceWarning):
            in_force.owner_at_door()
        with contextlib.suppress(StrayDeviceWarning):
            self.judge_memory()
        with contextlib.suppress(StrayDeviceWarning):
            table.inspect(_END)

    def judge_memory(self, *, is_shared: bool = False) -> None:
        """Record the memory on devices without an owner since the last picture.

        Parameters
        ----------
        is_shared : bool
            Whether another thread has run unguarded code since. The counters do not tell which thread allocates, so
            then only the lines count that the code which entered the block runs; the rest is reported.
        """
        if not table.is_open("native"):
            return
        by = self._own_code() if is_shared or _is_other_thread_unguarded() else None
        unknown = foreign_memory.record_growth(self._picture, self._mark, in_force.mode_of("native"), by=by)
        if unknown:
            warn_user(
                f"devguard: no_strays() did not judge the memory that was allocated on {', '.join(unknown)}, because "
                "another thread was inside unguarded() meanwhile, and torch does not record which thread allocates. To "
                "have it judged, let that thread leave unguarded() while the block runs.",
                at=self._line,
            )

    def _own_code(self) -> list[CodeType]:
        """Return the code that entered the block, unless another thread runs it, too."""
        others = [frame for ident, frame in sys._current_frames().items() if ident != self.thread]
        return [self._code] if not any(callsite.runs(frame, self._code) for frame in others) else []

    def judge_shared_memory(self) -> None:
        """Judge the memory so far, since unguarded code of this thread has ended while another thread has the block."""
        if self.thread != threading.get_ident() and not _is_unguarded(self._stack):
            self.judge_memory(is_shared=True)

    def renew(self) -> None:
        """Take a new picture: memory until now is no stray, or is recorded already."""
        self._picture = foreign_memory.take_picture()

    def end(self) -> None:
        """Restore what the block changed."""
        if self in _blocks:
            _blocks.remove(self)
        allocation_history.stop(self)
        if os.getpid() == self._pid and table.is_open("native"):
            for owner, device in self._past_owners.items():
                owner.device = owner.device or device

    def raise_for_strays(self) -> None:
        """Raise for the strays of the block."""
        found = [stray for stray in journal.since(self._mark) if stray.action != "placed" and not self._is_old(stray)]
        dropped = journal.dropped_since(self._mark)
        if found or dropped:
            more = f"\n  and {dropped} more at call sites beyond the journal's limit" if dropped else ""
            total = sum(stray.count for stray in found) + dropped
            lines = "".join(f"\n  {stray}" for stray in found)
            raise StrayDeviceError(f"{total} stray(s) inside no_strays():{lines}{more}")

    def _is_old(self, stray: Stray) -> bool:
        """Return whether a stray is a context from before the block, which only had to wait for an owner."""
        is_context = stray.door in ("native", "first_touch") and not foreign_memory.is_memory(stray)
        return is_context and self._before.issuperset(stray.source.split(","))


_blocks: list[_Block] = []  # the entered blocks of all threads


def judge_blocks() -> None:
    """Judge the memory of all blocks: unguarded code is about to run."""
    for block in tuple(_blocks):
        with contextlib.suppress(Exception):  # a scope is about to be entered
            block.judge_memory()


def renew_blocks() -> None:
    """Take new pictures for all blocks: what unguarded code has allocated is no stray."""
    for block in tuple(_blocks):
        with contextlib.suppress(Exception):  # the exit of a scope must not raise for another thread
            block.judge_shared_memory()
        block.renew()


def _is_unguarded(stack: Stack) -> bool:
    """Return whether the thread of a stack runs unguarded code now."""
    entries = tuple(stack)
    return bool(entries) and entries[-1][1] is None


def _is_other_thread_unguarded() -> bool:
    """Return whether another thread runs unguarded code now: the counters do not tell which thread allocates."""
    return any(_is_unguarded(stack) for stack in stacks() if stack is not local.stack)
