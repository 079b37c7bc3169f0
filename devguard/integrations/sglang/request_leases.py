"""The leases of the requests of SGLang's tokenizer: each ends, at the latest, when its request is forgotten.

A put never waits, because it runs in the tokenizer's event loop. A tensor that finds no room in the budget travels in
SGLang's own segment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from devguard.errors import BudgetFull
from devguard.support import forks
from devguard.support.notices import WARNING, log

if TYPE_CHECKING:
    from devguard.transport import Arena, Handle

__all__ = ["LOGGER", "put", "Requests", "Sender", "sending"]

LOGGER = "devguard.sglang"

_MISSING = object()

# The request that this task sends, and the table of its tokenizer.
sending: ContextVar[tuple[Requests, str] | None] = ContextVar("devguard_sglang_sending", default=None)


class Sender:
    """The arena of a tokenizer's process, made at the first put.

    Attributes
    ----------
    budget : int
        The most bytes under a lease.
    puts, fallbacks : int
        How many tensors were put, and how many travelled in SGLang's own segments, for lack of room or by an error.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.puts = self.fallbacks = 0
        self._lock = forks.new_lock()
        self._arena: Arena | None = None
        self._pid = 0
        self._open: set[int] = set()  # leases of requests that are not forgotten
        self._warned: set[type] = set()
        self._retired = False

    def put(self, tensor: Any, readers: int) -> Handle | None:
        """Put a tensor for `readers` ranks; None if it has to travel otherwise. Never waits, and never raises."""
        try:
            with self._lock:
                if self._retired:
                    return None
                on_host = tensor.detach().cpu().contiguous()  # as SGLang's segments hold it
                handle = self._arena_of_process().put(on_host, to=readers, block=False)
                self._open.add(handle.number)
                self.puts += 1
                return handle
        except Exception as error:  # noqa: BLE001 - SGLang's own segment serves as well
            self.fallbacks += 1
            if type(error) not in self._warned:
                self._warned.add(type(error))
                advice = " Or raise DEVGUARD_TRANSPORT_BUDGET." if isinstance(error, BudgetFull) else ""
                log(
                    f"devguard: host transport: this tensor, and each later one for which the same holds, travels in "
                    f"a segment of SGLang: {type(error).__name__}: {error}{advice}",
                    WARNING,
                    LOGGER,
                )
            return None

    def _arena_of_process(self) -> Arena:
        from devguard.transport import Arena

        if self._arena is None or self._pid != os.getpid():
            self._arena, self._pid = Arena("cpu", budget=self.budget), os.getpid()
            self._open.clear()
        return self._arena

    def cancel(self, leases: list[int]) -> None:
        """Cancel leases, of which some may have ended."""
        with self._lock:
            if self._arena is not None and self._pid == os.getpid():
                for number in leases:
                    self._arena.cancel(number)
                    self._open.discard(number)
            self._close_retired()

    def retire(self) -> None:
        """Put nothing more, and close the arena when the last request is forgotten."""
        with self._lock:
            self._retired = True
            self._close_retired()

    def _close_retired(self) -> None:
        if self._retired and not self._open and self._arena is not None and self._pid == os.getpid():
            self._arena.close()
            self._arena = None

    def usage(self) -> dict[str, int]:
        """Return what the arena holds, in bytes and leases, and the counts of this sender."""
        arena = self._arena if self._pid == os.getpid() else None
        held = None if arena is None else arena.usage()
        return {
            "budget": self.budget,
            "in_use": 0 if held is None else held.in_use,
            "peak": 0 if held is None else held.peak,
            "leases": 0 if held is None else len(held.leases),
            "puts": self.puts,
            "fallbacks": self.fallbacks,
        }


class Requests(dict[str, Any]):
    """The tokenizer's table of requests, by id, which cancels the leases of each request that leaves it.

    Parameters
    ----------
    states : mapping
        The requests so far.
    sender : Sender
        The arena.
    readers : int
        How many ranks read a tensor.
    """

    def __init__(self, states: Mapping[str, Any], sender: Sender, readers: int) -> None:
        super().__init__(states)
        self.sender, self.readers = sender, readers
        self._leases: dict[str, list[int]] = {}

    def put(self, rid: str, tensor: Any) -> Handle | None:
        """Put a tensor of a request; None if it has to travel otherwise."""
        if rid not in self:  # forgotten before it was sent: nothing would end the lease
            return None
        handle = self.sender.put(tensor, self.readers)
        if handle is not None:
            self._leases.setdefault(rid, []).append(handle.number)
        return handle

    def _forget(self, rid: str) -> None:
        leases = self._leases.pop(rid, None)
        if leases:
            self.sender.cancel(leases)

    def __delitem__(self, rid: str) -> None:
        super().__delitem__(rid)
        self._forget(rid)

    def pop(self, rid: str, default: Any = _MISSING) -> Any:
        found = super().pop(rid) if default is _MISSING else super().pop(rid, default)
        self._forget(rid)
        return found

    def popitem(self) -> tuple[str, Any]:
        found = super().popitem()
        self._forget(found[0])
        return found

    def clear(self) -> None:
        super().clear()
        for rid in list(self._leases):
            self._forget(rid)


def put(tensor: Any) -> Handle | None:
    """Put a tensor of the request that this task sends; None if no request is sent, or if there is no room."""
    request = sending.get()
    if request is None:
        return None
    requests, rid = request
    return requests.put(rid, tensor)
