"""What one test does to the devices of this process: looked at when it begins, and after each of its phases.

Known are the strays that the doors record, the current device, scopes of devguard that were entered and not left,
attributes of torch that devguard watches and that somebody else has patched since, and memory or contexts on devices
that nobody here owns. Where the mode repairs, what is found is put right if that is possible, so that the next test
begins as this one did.
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
from devguard.ownership.owner import owned_tags
from devguard.ownership.process import forget_past_owners, process, unguarded_contexts
from devguard.ownership.stack import local
from devguard.reporting import allowlist
from devguard.reporting.journal import journal
from devguard.reporting.stray import Stray
from devguard.support import accelerator, allocation_history, patching
from devguard.support.callsite import Frame, Origin, Site
from devguard.testing.findings import Finding, left_behind, of_stray

__all__ = ["Watch"]

PLACED = "placed"  # a thread that devguard started on the owner's device: nothing went wrong
_ADVICE_DEVICE = "Use `with torch.cuda.device(...)`, or set the device back before the test ends."
_ADVICE_SCOPE = "Leave it: use `with`, or a fixture that leaves it after its yield."
_ADVICE_PATCH = (
    "Undo it: use pytest's monkeypatch. Of a library that patches when it is imported: import it in a conftest."
)
_ADVICE_INSTALL = "Call devguard.uninstall(), or use `with devguard.guard(...)`."


class Watch:
    """The devices during one test.

    Parameters
    ----------
    item : pytest.Item
        The test.
    root : Path
        Paths below it are told relative to it.
    repairs : bool
        Whether what the test leaves behind is put right, or only told.
    """

    def __init__(self, item: pytest.Item, root: Path, *, repairs: bool) -> None:
        self._root = root
        self._repairs = repairs
        self._site, self._origin = _of_test(item)
        self._process = process.owner, process.mode
        forget_past_owners()
        table.accept_contexts()
        journal.clear()
        self._mark = journal.mark()
        self._unguarded = set(unguarded_contexts)
        unguarded_contexts.clear()
        allocation_history.record()
        self._used = _used()
        self._called = False
        self._patched: set[str] = set()

    def begin_call(self) -> None:
        """Note what the test itself begins with, after its fixtures."""
        self._called = True
        self._depth = len(local.stack)
        self._device = _current()
        self._patched = patching.overwritten()

    def look(self) -> list[Finding]:
        """Return what was found since the last look, the gravest first, and put right what can be."""
        found: list[Finding] = []
        called, self._called = self._called, False
        if called:
            found += self._scopes()
        with contextlib.suppress(StrayDeviceError):  # it is in the journal
            in_force.end_task()
        if called:
            found += self._device_left() + self._patches() + self._installed()
        self._foreign()
        strays = [stray for stray in journal.since(self._mark) if stray.action != PLACED]
        dropped = journal.dropped_since(self._mark)
        self._mark = journal.mark()
        strays.sort(key=lambda stray: -stray.bytes)
        found = [of_stray(stray, self._root) for stray in strays] + found
        if dropped:
            text = f"{dropped} strays at call sites beyond the journal's limit"
            found.append(left_behind("journal", text, "Look at the others first.", self._site, self._root))
        return found

    def end(self) -> None:
        """Give back what was set aside for this test."""
        unguarded_contexts.update(self._unguarded)

    def _left(self, kind: str, text: str, advice: str) -> Finding:
        return left_behind(kind, text, advice, self._site, self._root)

    def _scopes(self) -> list[Finding]:
        """Leave the scopes that the test has entered and not left."""
        entered = [entry[0] for entry in local.stack[self._depth :]]
        for within in reversed(entered) if self._repairs else ():
            if isinstance(within, Scope):
                with contextlib.suppress(StrayDeviceError):
                    within.__exit__(None, None, None)
        return [self._left("scope", f"{within!r} was entered and not left", _ADVICE_SCOPE) for within in entered]

    def _device_left(self) -> list[Finding]:
        """Put the current device back, if nothing that the doors watch has explained and repaired it."""
        now, before = _current(), self._device
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

    def _patches(self) -> list[Finding]:
        new = patching.overwritten() - self._patched
        return [
            self._left("patch", f"{name} was patched over devguard and not restored", _ADVICE_PATCH) for name in new
        ]

    def _installed(self) -> list[Finding]:
        """Find an owner that the test made that of the process. That it took ours away is nothing to complain of."""
        owner, mode = process.owner, process.mode
        if owner is None or (owner, mode) == self._process:
            return []
        return [self._left("install", f"devguard.install(): the process owns {owner.tag} now", _ADVICE_INSTALL)]

    def _foreign(self) -> None:
        """Record contexts that no door explains, and memory of devices that nobody owned here."""
        table.inspect("at the end of a test", self._origin)
        before, self._used = self._used, _used()
        owned = owned_tags()
        if not owned or in_force.mode_of("native") == "off":
            return  # without an owner the test has uninstalled devguard
        told = {tag for stray in journal.since(self._mark) for tag in _explained(stray)}
        for index, number in self._used.items():
            tag = f"cuda:{index}"
            grown = number - before.get(index, 0)
            if grown < 1 or tag in owned or tag in told or index in unguarded_contexts or allowlist.is_allowed(tag):
                continue
            origin, nbytes = allocation_history.newest(index, grown)
            note = f"torch allocated {grown} x there, and no door saw it"
            where = origin or self._origin
            journal.record("native", tag, tag, ", ".join(owned), "observed", nbytes, note=note, origin=where)


def _explained(stray: Stray) -> list[str]:
    """Return the devices on which this stray may have put something."""
    if stray.action in ("repaired", PLACED) or (stray.action == "refused" and stray.door != "set_device"):
        return []
    return stray.source.split(",")


def _used() -> dict[int, int]:
    """Return how often memory was allocated on each device with a context."""
    return {index: allocation_history.count(index) for index in accelerator.contexts()}


def _current() -> int:
    """Return the current device; -1 where CUDA is not in use, so that asking opens nothing."""
    if not accelerator.contexts():
        return -1
    return int(accelerator.torch_module()._C._cuda_getDevice())


def _of_test(item: pytest.Item) -> tuple[Site | None, Origin]:
    """Return the first line of a test, as a site and as an origin."""
    code = getattr(getattr(item, "function", None), "__code__", None)
    if code is None:
        path, line, name = item.location
        site = Site(os.path.join(item.config.rootpath, path), (line or 0) + 1, name)
        return site, Origin(None, 0, None, ())
    frame = Frame(code, code.co_firstlineno)
    return Site.of(frame), Origin(code, frame.line, None, (frame,))
