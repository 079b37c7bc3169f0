"""Coroutines and generators in a scope: each step enters the scope, and each suspend leaves it.

A suspended coroutine must not keep the device of its thread, because other tasks run on the thread. So a decorated
function is driven step by step, with at most two exchanges of the device a step, and none if the device is right.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from devguard.ownership.stack import Entry, Stack, local

__all__ = ["Steps", "unregistered"]


class Steps:
    """An iterator, and an awaitable, that runs each step of `inner` inside a scope.

    Parameters
    ----------
    within : context manager
        A scope with a known owner.
    inner : generator, coroutine or iterator
        The code to step. Scopes that `inner` holds across a suspend are left and entered with it.
    """

    __slots__ = ("_advance", "_held", "_inner", "_within")

    def __init__(self, within: AbstractContextManager[Any], inner: Any) -> None:
        self._within = within
        self._inner = inner
        self._advance = getattr(inner, "__next__", None)  # a coroutine has only send
        self._held: list[Entry] = []

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
        """Raise in `inner`, inside the scope."""
        if hasattr(self._inner, "throw"):
            return self._step(self._inner.throw, *error)
        raised = error[1] if len(error) > 1 and error[1] is not None else error[0]  # a plain iterator catches nothing
        raise raised

    def close(self) -> None:
        """Close `inner` inside the scope, so that its clean-up code runs on the scope's device."""
        if hasattr(self._inner, "close"):
            self._step(self._inner.close)

    def _step(self, resume: Any, *arguments: Any) -> Any:
        within = self._within
        stack = local.stack
        depth = len(stack) + 1
        within.__enter__()
        if self._held:
            self._wake(stack)
        try:
            result = resume(*arguments)
            if stack.changes:  # suspended code may still undo them, and its device is given back now anyway
                stack.changes = [change for change in stack.changes if change.depth < depth]
            return result
        finally:
            if len(stack) > depth:  # a plain `with` inside is held across this suspend
                self._sleep(stack, depth)
            within.__exit__(None, None, None)

    def _sleep(self, stack: Stack, depth: int) -> None:
        """Take the entries above `depth` off the stack, and give back the device that the lowest of them took."""
        self._held = stack[depth:]
        del stack[depth:]
        for _, _, previous in self._held:
            if previous >= 0:
                stack.give_back(previous)
                break

    def _wake(self, stack: Stack) -> None:
        """Put the entries back: take the innermost device, and let the lowest entry give back the current one."""
        held, self._held = self._held, []
        takers = [position for position, entry in enumerate(held) if entry[2] >= 0]
        if takers:
            within, owner, _ = held[takers[0]]
            innermost = held[takers[-1]][1]
            assert innermost is not None
            held[takers[0]] = (within, owner, stack.take(innermost.index))
        stack.extend(held)
        stack.judged = None


def unregistered(generator: Any) -> Any:
    """Return the first step of an asynchronous generator, without registering the generator with the event loop.

    A loop closes the generators that it knows when it ends: outside the scope, and together with the decorated
    generator around this one.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=None)
    try:
        return generator.__anext__()
    finally:
        sys.set_asyncgen_hooks(*hooks)
