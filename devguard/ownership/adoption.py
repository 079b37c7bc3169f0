"""A guessed owner, which later calls can correct; for activation by environment.

The candidate is the launcher's local rank, if there are several, and later the latest device that the main thread chose
permanently (``torch.cuda.set_device`` and similar calls). The first stray freezes it. Without one, nothing is moved. A
named device (``DEVGUARD_DEVICE``), or the only visible one, is no guess: it is firm from the start.

- A guess repairs and refuses only in a process that is one of several: several local ranks, or a `multiprocessing`
  child. Elsewhere, as in a program that spreads one model over all GPUs, every mode but ``off`` observes.
- If the main thread later chooses another device, and has not put it back by the next door, the guess was wrong:
  devguard warns once and only observes from then on.
"""

from __future__ import annotations

import sys
import threading
from types import CodeType, FrameType
from typing import Any, Protocol

from devguard.modes import DoorMode
from devguard.ownership.owner import Owner, owner_of_index
from devguard.ownership.prepare import prepare
from devguard.ownership.stack import local
from devguard.support import accelerator, callsite
from devguard.support.callsite import Site
from devguard.support.notices import warn_user

__all__ = ["Adoption", "is_child"]


class Holder(Protocol):
    """The process for which an `Adoption` finds the owner."""

    @property
    def owner(self) -> Owner | None: ...

    def own(self, owner: Owner | None, adoption: Adoption | None = None) -> None: ...

    def renew(self) -> None: ...


def is_child() -> bool:
    """Return whether this process is a `multiprocessing` child, also while the child is still being prepared."""
    processes: Any = sys.modules.get("multiprocessing.process")
    return processes is not None and (
        processes.parent_process() is not None or getattr(processes.current_process(), "_inheriting", False)
    )


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
    """

    __slots__ = ("_away", "_holder", "_lock", "_several", "demoted", "firm", "frozen", "pin", "source")

    def __init__(self, holder: Holder, source: str, *, firm: bool, pin: bool, several: bool) -> None:
        self._holder = holder
        self.source = source
        self.firm = firm
        self.pin = pin
        self.frozen = False
        self.demoted = False
        self._several = several
        self._away: tuple[CodeType | None, int] | None = None  # where the main thread left the owner's device
        self._lock = threading.RLock()

    def watches(self) -> bool:
        """Return whether a change of the current device on this thread can change or refute the owner."""
        return not self.firm and not self.demoted and threading.get_ident() == threading.main_thread().ident

    def follow(self, index: int, start: FrameType) -> None:
        """Follow the main thread: the code at `start` has made the device `index` current for good."""
        if not self.frozen:
            self.source = "set_device"
            self._holder.own(owner_of_index(index), self)
        elif self._holder.owner is not owner_of_index(index):
            self._away = callsite.find(start)[:2]
        else:
            self._away = None

    def make_owner_current(self) -> None:
        """Make the owner's device current on this thread, which is initialising CUDA; opens no context."""
        owner = self._holder.owner
        if self.pin and owner is not None and owner.index >= 0 and not local.stack:
            back = accelerator.bind().back
            accelerator.call_when_initialized(lambda: back(owner.index))

    def freeze_owner(self) -> None:
        """Freeze the owner before a stray is handled; demote it if the main thread has chosen another device."""
        if not self.frozen:
            with self._lock:
                self._freeze()
        if self._away is not None and self.watches():
            self._demote()

    def check_contexts(self) -> None:
        """Freeze the owner if this process holds a context on another device, since that context is a stray."""
        owner = self._holder.owner
        if self.frozen or owner is None or owner.index < 0 or not (self.firm or self.is_one_of_several()):
            return
        if any(index != owner.index for index in accelerator.contexts()):
            self.freeze_owner()

    def limit_mode(self, mode: DoorMode) -> DoorMode:
        """Return `mode`, or ``observe`` in its place where a guess must change nothing."""
        if mode == "off" or self.firm or (not self.demoted and self.is_one_of_several()):
            return mode
        return "observe"

    def is_one_of_several(self) -> bool:
        """Return whether this process is one of several that can each own a GPU."""
        if not self._several:
            self._several = is_child()
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

    def _demote(self) -> None:
        """Demote the owner and warn, unless its device is current again on the main thread."""
        owner = self._holder.owner
        if owner is None or self._away is None or accelerator.current_device() == owner.index:
            self._away = None
            return
        self.demoted = True
        self._holder.renew()
        code, line = self._away
        where = Site(code.co_filename, line, code.co_name) if code is not None else "a library"
        text = (
            f"devguard assumed that this process owns {owner.tag} (from {self.source}), but {where} later selected "
            "another device. It now only observes. Name the owner: DEVGUARD_DEVICE, or a guard."
        )
        warn_user(text, at=None if code is None else (code.co_filename, line), level=4)
