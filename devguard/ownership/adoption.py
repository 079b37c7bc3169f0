"""Finding the owner of a process that never names one: for activation by environment.

The candidate is what the launcher says (where it says that there are several local ranks), and from then on the latest
device that the main thread chose for good: ``torch.cuda.set_device`` and its like. It is frozen when the first stray
would be handled. What was adopted is a guess, so:

- It repairs and refuses only in a process that is one of several: several local ranks, or a `multiprocessing` child.
  Elsewhere, as in a program that spreads one model over all GPUs, every mode but ``off`` observes.
- If the main thread chooses another device later and has not put it back by the next door, the guess was wrong: from
  then on it observes, after one warning.

Before there is a candidate there is no owner, and nothing is moved. A device that was named, in ``DEVGUARD_DEVICE`` or
by being the only one, is no guess: it is firm from the start.
"""

from __future__ import annotations

import sys
import threading
import warnings
from types import CodeType, FrameType
from typing import Any, Protocol

from devguard.modes import DoorMode
from devguard.ownership.owner import Owner, owner_of_index
from devguard.ownership.prepare import prepare
from devguard.ownership.stack import local
from devguard.support import accelerator, callsite
from devguard.support.callsite import Site

__all__ = ["Adoption", "is_child"]


class Holder(Protocol):
    """The process whose owner an `Adoption` finds."""

    @property
    def owner(self) -> Owner | None: ...

    def own(self, owner: Owner | None, adoption: Adoption | None = None) -> None: ...

    def renew(self) -> None: ...


def is_child() -> bool:
    """Tell whether this process is a `multiprocessing` child, also while it is still being made ready."""
    processes: Any = sys.modules.get("multiprocessing.process")
    return processes is not None and (
        processes.parent_process() is not None or getattr(processes.current_process(), "_inheriting", False)
    )


class Adoption:
    """How the owner of this process was found, and whether it still may change.

    Parameters
    ----------
    holder : Holder
        The process. Its `own` puts an adoption in force, with the first candidate.
    source : str
        Where it came from, for ``status()``.
    firm : bool
        Whether it was named, and is no guess.
    pin : bool
        Whether the device is to be made current at the first touch of CUDA: the program may never choose one.
    several : bool
        Whether the launcher says that this process is one of several.
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
        """Tell whether a change of the current device on this thread matters."""
        return not self.firm and not self.demoted and threading.get_ident() == threading.main_thread().ident

    def moved(self, index: int, start: FrameType) -> None:
        """Follow the main thread, which has made the device `index` current for good, in the code at `start`."""
        if not self.frozen:
            self.source = "set_device"
            self._holder.own(owner_of_index(index), self)
        elif self._holder.owner is not owner_of_index(index):
            self._away = callsite.find(start)[:2]
        else:
            self._away = None

    def touched(self) -> None:
        """Make the owner's device the current one of this thread, which initialises CUDA now; opens no context."""
        owner = self._holder.owner
        if self.pin and owner is not None and owner.index >= 0 and not local.stack:
            back = accelerator.bind().back
            # as `torch.cuda._lazy_call`, whose lock torch holds now: any call into CUDA before its end waits for ever
            sys.modules["torch"].cuda._queued_calls.append((lambda: back(owner.index), []))

    def handle(self) -> None:
        """Stop following, since a stray is about to be handled; demote the owner if the main thread has left it."""
        if not self.frozen:
            with self._lock:
                self._freeze()
        if self._away is not None and self.watches():
            self._judge()

    def check_contexts(self) -> None:
        """Look at the contexts of this process, at its end or when somebody asks: a foreign one is a stray."""
        owner = self._holder.owner
        if self.frozen or owner is None or owner.index < 0 or not (self.firm or self.one_of_several()):
            return
        if any(index != owner.index for index in accelerator.contexts()):
            self.handle()

    def mode(self, said: DoorMode) -> DoorMode:
        """Return the mode that really holds where `said` was asked for."""
        if said == "off" or self.firm or (not self.demoted and self.one_of_several()):
            return said
        return "observe"

    def one_of_several(self) -> bool:
        """Tell whether this process is one of several that each may own a GPU."""
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
            "one_of_several": self.one_of_several(),
            "demoted": self.demoted,
        }

    def _freeze(self) -> None:
        owner = self._holder.owner
        if self.frozen or owner is None:
            return
        self.frozen = True  # first: preparing may find a stray by itself
        if owner.device is None:
            prepare(owner)

    def _judge(self) -> None:
        """Demote the owner, if another device is current on the main thread."""
        owner = self._holder.owner
        torch = sys.modules["torch"]
        if owner is None or self._away is None or torch._C._cuda_getDevice() == owner.index:
            self._away = None
            return
        self.demoted = True
        self._holder.renew()
        code, line = self._away
        where = Site(code.co_filename, line, code.co_name) if code is not None else "no line of user code"
        text = (
            f"devguard took {owner.tag} for the device of this process, because {self.source} said so; {where} has "
            "chosen another one since. It only observes from now on. Name the owner: DEVGUARD_DEVICE, or a guard."
        )
        if code is None:
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        else:
            warnings.warn_explicit(text, RuntimeWarning, code.co_filename, line)
