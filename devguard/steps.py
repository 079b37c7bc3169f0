"""Coroutines and generators under a scope: each step enters it, each suspend leaves it.

A coroutine that sleeps must not keep the device of its thread, because other tasks run there meanwhile. So
a decorated function is driven step by step: at most two exchanges a step, none where the device is already
right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devguard import scope

if TYPE_CHECKING:
    from devguard.scopes import Scope

__all__ = ["Steps"]


class Steps:
    """An iterator, and an awaitable, that passes each step on to `inner` inside a scope.

    Parameters
    ----------
    within : Scope
        A scope whose owner is known.
    inner : generator, coroutine or iterator
        What to step. Scopes that `inner` itself holds across a suspend sleep and wake with it.
    """

    __slots__ = ("_advance", "_held", "_inner", "_within")

    def __init__(self, within: Scope, inner: Any) -> None:
        self._within = within
        self._inner = inner
        self._advance = getattr(inner, "__next__", None)  # a coroutine has only send
        self._held: list[scope.Entry] = []

    def __iter__(self) -> Steps:
        return self

    __await__ = __iter__

    def __next__(self) -> Any:
        if self._advance is None:
            return self._step(self._inner.send, None)
        return self._step(self._advance)

    def send(self, value: Any) -> Any:
        """Resume with `value`, inside the scope."""
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        """Raise inside, within the scope."""
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        """Close, within the scope: the clean-up code of the function runs on its own device too."""
        self._step(self._inner.close)

    def _step(self, resume: Any, *arguments: Any) -> Any:
        within = self._within
        stack = scope.local.stack
        depth = len(stack) + 1
        within.__enter__()
        if self._held:
            self._wake(stack)
        try:
            return resume(*arguments)
        finally:
            if len(stack) > depth:  # a plain `with` inside is held across this suspend
                self._held = stack[depth:]
                del stack[depth:]
                stack.moved = True  # its device is current
            within.__exit__(None, None, None)

    def _wake(self, stack: scope.Stack) -> None:
        stack.extend(self._held)
        owner = self._held[-1][1]
        self._held = []
        if owner is not None and owner.index >= 0:
            stack.take(owner.index)
