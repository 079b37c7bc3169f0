"""Watches the devices of this process during one test, and collects the findings after each of its phases.

It finds strays that the doors record, a changed current device, scopes of devguard that were entered and not exited,
attributes of torch that devguard watches and other code has patched since, and memory or contexts on devices that have
no owner here. If the mode repairs, the findings are undone where possible, so that the next test starts from the same
state.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from devguard.doors import table
from devguard.errors import StrayDeviceError
from devguard.guards.base import Scope
from devguard.ownership import in_force
from devguard.ownership.process import forget_past_owners, process, unguarded_contexts
from devguard.ownership.stack import local
from devguard.reporting import foreign_memory
from devguard.reporting.journal import journal
from devguard.support import accelerator, allocation_history, patching
from devguard.support.callsite import Frame, Origin, Site
from devguard.testing.findings import Finding, from_stray, left_behind

__all__ = ["Watch"]

PLACED = "placed"  # a thread that devguard started on the owner's device, which is no problem
_ADVICE_DEVICE = "Use `with torch.cuda.device(...)`, or restore the device before the test ends."
_ADVICE_SCOPE = "Exit it: use `with`, or a fixture that exits it after its yield."
_ADVICE_PATCH = "Undo it: use pytest's monkeypatch. If a library patches when it is imported, import it in a conftest."
_ADVICE_INSTALL = "Call devguard.uninstall(), or use `with devguard.guard(...)`."


class Watch:
    """The devices during one test.

    Parameters
    ----------
    item : pytest.Item
        The test.
    root : Path
        Paths below it are reported relative to it.
    repairs : bool
        Whether to undo what the test leaves behind, or only to report it.
    """

    def __init__(self, item: pytest.Item, root: Path, *, repairs: bool) -> None:
        self._root = root
        self._repairs = repairs
        self._site, self._origin = _locate(item)
        self._process = process.owner, process.mode
        forget_past_owners()
        table.accept_contexts()
        journal.clear()
        self._mark = journal.mark()
        self._unguarded = set(unguarded_contexts)
        unguarded_contexts.clear()
        allocation_history.record()
        self._picture = foreign_memory.take_picture()
        self._called = False
        self._patched: set[str] = set()

    def start_call(self) -> None:
        """Record the state in which the test itself starts, after its fixtures."""
        self._called = True
        self._depth = len(local.stack)
        self._device = _current_device()
        self._patched = patching.overwritten()

    def look(self) -> list[Finding]:
        """Return the findings since the last look, most bytes first, and undo them where possible."""
        found: list[Finding] = []
        called, self._called = self._called, False
        if called:
            found += self._exit_scopes()
        with contextlib.suppress(StrayDeviceError):  # The journal holds it already.
            in_force.end_task()
        if called:
            found += self._restore_device() + self._find_patches() + self._find_install()
        self._record_unowned()
        strays = [stray for stray in journal.since(self._mark) if stray.action != PLACED]
        dropped = journal.dropped_since(self._mark)
        self._mark = journal.mark()
        strays.sort(key=lambda stray: -stray.bytes)
        found = [from_stray(stray, self._root) for stray in strays] + found
        if dropped:
            text = f"{dropped} strays at call sites beyond the journal's limit"
            found.append(left_behind("journal", text, "Look at the others first.", self._site, self._root))
        return found

    def end(self) -> None:
        """Restore the unguarded contexts that were set aside for this test."""
        unguarded_contexts.update(self._unguarded)

    def _left(self, kind: str, text: str, advice: str) -> Finding:
        return left_behind(kind, text, advice, self._site, self._root)

    def _exit_scopes(self) -> list[Finding]:
        """Exit the scopes that the test entered and did not exit."""
        entered = [entry[0] for entry in local.stack[self._depth :]]
        for scope in reversed(entered) if self._repairs else ():
            if isinstance(scope, Scope):
                with contextlib.suppress(StrayDeviceError):
                    scope.__exit__(None, None, None)
        return [self._left("scope", f"{scope!r} was entered and not exited", _ADVICE_SCOPE) for scope in entered]

    def _restore_device(self) -> list[Finding]:
        """Restore the current device, and report the change unless the door ``set_device`` already did."""
        now, before = _current_device(), self._device
        if now == before or before < 0:
            return []
        owner = in_force.owner()
        if owner is not None and now == owner.index:
            return []
        if self._repairs:
            accelerator.bind().back(before)
        explained = [stray for stray in journal.since(self._mark) if stray.door == "set_device"]
        if any(stray.source == f"cuda:{now}" for stray in explained):
            return []
        text = f"cuda:{now} was left as the current device; the test began on cuda:{before}"
        return [self._left("current device", text, _ADVICE_DEVICE)]

    def _find_patches(self) -> list[Finding]:
        new = patching.overwritten() - self._patched
        return [
            self._left("patch", f"{name} was patched over devguard and not restored", _ADVICE_PATCH) for name in new
        ]

    def _find_install(self) -> list[Finding]:
        """Report an owner that the test installed. A test may uninstall: the next one gets the session's owner back."""
        owner, mode = process.owner, process.mode
        if owner is None or (owner, mode) == self._process:
            return []
        return [self._left("install", f"devguard.install(): the process now owns {owner.tag}", _ADVICE_INSTALL)]

    def _record_unowned(self) -> None:
        """Record contexts that no door explains, and memory on devices that have no owner here."""
        table.inspect("at the end of a test", self._origin)
        before, self._picture = self._picture, foreign_memory.take_picture()
        # If there is no owner, the test has uninstalled devguard.
        mode = in_force.mode_of("native")
        foreign_memory.record_growth(before, self._mark, mode, self._origin, unguarded_contexts)


def _current_device() -> int:
    """Return the current device; -1 if CUDA is not in use, since the query would open a context."""
    if not accelerator.contexts():
        return -1
    return accelerator.current_device()


def _locate(item: pytest.Item) -> tuple[Site | None, Origin]:
    """Return the first line of a test, as a site and as an origin."""
    code = getattr(getattr(item, "function", None), "__code__", None)
    if code is None:
        path, line, name = item.location
        site = Site(os.path.join(item.config.rootpath, path), (line or 0) + 1, name)
        return site, Origin(None, 0, None, ())
    frame = Frame(code, code.co_firstlineno)
    return Site.of(frame), Origin(code, frame.line, None, (frame,))
