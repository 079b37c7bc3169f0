"""A guessed owner, which later calls can correct; for activation by environment.

The candidate is the launcher's local rank, if there are several, and later the latest device that the main thread chose
permanently (``torch.cuda.set_device`` and similar calls). The first stray freezes it. Without one, nothing is moved. A
named device (``DEVGUARD_DEVICE``), or the only visible one, is no guess: it is firm from the start.

A guess repairs and refuses only in a process that is one of several: several local ranks, or as in siblings.py.
Elsewhere every mode but ``off`` observes, and the first stray is reported to the user. A guess is demoted to observe,
with a report, if the program works on another GPU by name (named_work.py), or if the main thread later chooses another
device and has not put it back by the next door. Beside a guard, a guess that was never used is not owned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any, Protocol

from devguard.modes import DoorMode, Mode
from devguard.ownership import guess_report
from devguard.ownership.named_work import NamedWork
from devguard.ownership.owner import CPU, Owner, owned_tags, owner_of_index
from devguard.ownership.prepare import prepare
from devguard.ownership.siblings import has_siblings
from devguard.ownership.stack import local
from devguard.support import accelerator, callsite, forks
from devguard.support.callsite import Site
from devguard.support.notices import alert, warn_user

__all__ = ["Adoption"]


class Holder(Protocol):
    """The process for which an `Adoption` finds the owner."""

    @property
    def owner(self) -> Owner | None: ...

    @property
    def mode(self) -> Mode | None: ...

    @property
    def doors(self) -> Mapping[str, DoorMode]: ...

    def own(self, owner: Owner | None, adoption: Adoption | None = None) -> None: ...

    def renew(self) -> None: ...


class Adoption:
    """How the owner of this process was found, and whether it can still change.

    Parameters
    ----------
    holder : Holder
        The process. Its `own` puts an adoption in force, with the first candidate.
    source : str
        Where the owner comes from, for ``status()``.
    firm : bool
        Whether the owner was named, and is no guess.
    pin : bool
        Whether to make the device current when CUDA is initialised, because the program may never choose one.
    several : bool
        Whether the launcher's variables show that this process is one of several.
    rank : Owner, optional
        The device of the launcher's local rank, or of the rank that started this child.
    is_accounted : callable
        As for `NamedWork`.
    """

    __slots__ = (
        "_away",
        "_holder",
        "_is_reported",
        "_lock",
        "_named_work",
        "_rank",
        "_several",
        "demoted",
        "firm",
        "frozen",
        "pin",
        "source",
    )

    def __init__(
        self,
        holder: Holder,
        source: str,
        *,
        firm: bool,
        pin: bool,
        several: bool,
        rank: Owner | None = None,
        is_accounted: Callable[[int], bool] = lambda index: False,
    ) -> None:
        self._holder = holder
        self.source = source
        self.firm = firm
        self.pin = pin
        self.frozen = False
        self.demoted = False
        self._several = several
        self._rank = rank
        self._named_work = NamedWork(is_accounted)
        self._is_reported = False
        self._away: tuple[CodeType | None, int] | None = None  # where the main thread left the owner's device
        self._lock = forks.new_lock()

    def watches(self) -> bool:
        """Return whether a change of the current device on this thread can change or refute the owner."""
        return not self.firm and not self.demoted and threading.get_ident() == threading.main_thread().ident

    def follow(self, index: int, start: FrameType) -> None:
        """Follow the main thread: the code at `start` has made the device `index` current for good."""
        self._named_work.select(index)
        if not self.frozen:
            self.source = "set_device"
            self._holder.own(owner_of_index(index), self)
        elif self._holder.owner is not owner_of_index(index):
            self._away = callsite.find(start)[:2]
        else:
            self._away = None

    def owner_at_first_use(self) -> Owner | None:
        """Return the owner where this process first uses a GPU: the GPU of its rank, if it has chosen none."""
        if self._holder.owner is None and self._rank is not None:
            self.source, self.pin = "the local rank of its parent", True
            self._holder.own(self._rank, self)
        return self._holder.owner

    def make_owner_current(self, *, chooses: bool, uses_current: bool) -> None:
        """Make the owner's device current on this thread, which is initialising CUDA, and open its context.

        Without one, torch loses the device in ``empty(1, device="cuda")`` and opens GPU 0. Not opened if the call under
        way `chooses` a device; in a helper process, only if the call surely `uses_current`, the current device.
        """
        is_helper = self._holder.owner is None
        owner = self.owner_at_first_use()
        if self.pin and owner is not None and owner.index >= 0 and not local.stack:
            device, exchange = owner.index, accelerator.bind()
            opens = not chooses and (uses_current or not is_helper)
            accelerator.call_when_initialized(lambda: (exchange.choose if opens else exchange.back)(device))

    def freeze_owner(self, source: str = "") -> None:
        """Freeze the owner before a stray to `source` is handled; demote it if this process has left it since."""
        if not self.frozen:
            with self._lock:
                self._freeze()
        if self.firm or self.demoted:
            return
        if self._away is not None and self.watches():
            self._demote_if_away()
        elif self._named_work.may_have_begun(source):
            self.look_for_named_work()

    def look_for_named_work(self) -> None:
        """Demote the owner if the program works on other GPUs by name; for each new call site of strays."""
        owner = self._holder.owner
        if self.firm or self.demoted or owner is None or owner.index < 0 or not self.is_one_of_several():
            return
        found = self._named_work.find(owner.index, ignored=(0,) if owner is self._rank else ())
        if found:
            names = ", ".join(f"cuda:{index}" for index in found)
            self._demote(owner, f"the program also works on {names} by name")

    def note_stray(self, tags: str) -> None:
        """Note that data was left on devices to which its tags brought it."""
        self._named_work.note_stray(tags)

    def note_unowned(self, tag: str) -> None:
        """Note that data came to a device by its tag while this process had no owner, so that it stays there."""
        self._named_work.note_stray(tag)
        self.report_limit()

    def check_contexts(self) -> None:
        """Freeze the owner if this process holds a context on a device that is not owned, since that is a stray."""
        owner = self._holder.owner
        if self.frozen or owner is None or not (self.firm or owner is CPU or self.is_one_of_several()):
            return
        owned = [] if self.firm else owned_tags()  # by guards, which know better than a guess
        if any(index != owner.index and f"cuda:{index}" not in owned for index in accelerator.contexts()):
            self.freeze_owner()

    def yield_to(self, other: Owner) -> None:
        """Freeze a guess that is in use, and free one that is not, before a guard first makes `other` an owner.

        The guess then counts as owned only if this process holds a context on its device.
        """
        owner = self._holder.owner
        if self.firm or owner is None or owner is other or owner.index < 0 or other.index < 0:
            return
        if owner.index in accelerator.contexts():
            self.freeze_owner()
        elif self.frozen:
            self.frozen, owner.device = False, None

    def report_unguarded(self) -> None:
        """At the end of the process: report that it only observed, if it used GPUs that no guard explains."""
        owner = self._holder.owner
        explained = owned_tags() if owner is None else [*owned_tags(), owner.tag]
        is_accounted = self._named_work.is_accounted
        if all(f"cuda:{index}" in explained or is_accounted(index) for index in accelerator.contexts()):
            return
        if owner is None:
            self._report_limit()
        else:
            self.report_limit()

    def report_limit(self) -> None:
        """Report once that this process only observes, if it does because nothing shows that it is one of several."""
        if not self.is_one_of_several():
            self._report_limit()

    def limit_mode(self, mode: DoorMode) -> DoorMode:
        """Return `mode`, or ``observe`` in its place where a guess must change nothing."""
        if mode == "off" or self.firm or (not self.demoted and self.is_one_of_several()):
            return mode
        return "observe"

    def is_one_of_several(self) -> bool:
        """Return whether this process is one of several that can each own a GPU."""
        if not self._several:
            self._several = has_siblings()
            if self._several:
                self._holder.renew()
        return self._several

    def as_dict(self) -> dict[str, Any]:
        """Return how the owner was found, as plain data."""
        return {
            "source": self.source,
            "firm": self.firm,
            "frozen": self.frozen,
            "one_of_several": self.is_one_of_several(),
            "demoted": self.demoted,
        }

    def _freeze(self) -> None:
        owner = self._holder.owner
        if self.frozen or owner is None:
            return
        self.frozen = True  # First, because preparing may find a stray.
        if owner.device is None:
            prepare(owner)
        self.look_for_named_work()

    def _demote_if_away(self) -> None:
        """Demote the owner, unless its device is current again on the main thread."""
        owner = self._holder.owner
        if owner is None or self._away is None or accelerator.current_device() == owner.index:
            self._away = None
            return
        code, line = self._away
        where = Site(code.co_filename, line, code.co_name) if code is not None else "a library"
        text = self._demote(owner, f"{where} later selected another device")
        warn_user(text, at=None if code is None else (code.co_filename, line), level=4)

    def _demote(self, owner: Owner, reason: str) -> str:
        """Only observe from now on; report the reason, and return the text."""
        self.demoted = True
        self._holder.renew()
        text = guess_report.describe_demotion(owner, self.source, reason)
        if self._active_modes():
            alert(text)
        return text

    def _report_limit(self) -> None:
        """Report once that devguard only observes in this process, although its mode promises more."""
        active = self._active_modes()
        if self._is_reported or self.firm or not active or accelerator.device_count() < 2:
            return
        self._is_reported = True
        alert(guess_report.describe_limit(self._holder.owner, self.source, active))

    def _active_modes(self) -> list[str]:
        return guess_report.list_active_modes(self._holder.mode, self._holder.doors)
