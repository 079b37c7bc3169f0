"""`unguarded`: a scope without an owner, the escape hatch."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType

from devguard.guards import unwind
from devguard.guards.base import Scope
from devguard.guards.no_strays import judge_blocks, renew_blocks
from devguard.modes import DoorMode
from devguard.ownership.process import unguarded_contexts
from devguard.ownership.stack import local
from devguard.support import accelerator

__all__ = ["unguarded"]


class unguarded(Scope):
    """A scope without an owner, in which every door is off: for code that uses several GPUs on purpose.

    The current device stays as it is.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        judge_blocks()
        stack = local.stack
        if unwind.is_entered(stack, self):
            unwind.enter_again(self, None, sys._getframe(1))
        else:
            stack.append((self, None, stack.take(-1)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack = local.stack
        if stack and stack[-1][0] is self:
            del stack[-1]
        else:
            unwind.leave(self, sys._getframe(1), kind is not None)
        with contextlib.suppress(Exception):
            unguarded_contexts.update(accelerator.contexts())  # the code inside opened them on purpose
            renew_blocks()

    def mode_of(self, door: str) -> DoorMode | None:
        """Return ``'off'``."""
        return "off"

    def __eq__(self, other: object) -> bool:
        return type(other) is unguarded

    def __hash__(self) -> int:
        return hash(unguarded)

    def __repr__(self) -> str:
        return "devguard.unguarded()"
