"""`unguarded`: a scope without an owner, the escape hatch."""

from __future__ import annotations

from types import TracebackType

from devguard.guards.base import Scope
from devguard.modes import DoorMode
from devguard.ownership.process import unguarded_contexts
from devguard.support import accelerator

__all__ = ["unguarded"]


class unguarded(Scope):
    """A scope without an owner, in which every door is off: for code that uses several GPUs on purpose.

    The current device stays as it is.
    """

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unguarded_contexts.update(accelerator.contexts())  # the code inside opened them on purpose
        super().__exit__(kind, error, traceback)

    def mode_of(self, door: str) -> DoorMode | None:
        """Return ``'off'``."""
        return "off"

    def __eq__(self, other: object) -> bool:
        return type(other) is unguarded

    def __hash__(self) -> int:
        return hash(unguarded)

    def __repr__(self) -> str:
        return "devguard.unguarded()"
