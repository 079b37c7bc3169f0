"""Coroutines and generators in a scope: each step enters the scope, and each suspend leaves it.

A suspended coroutine must not keep the device of its thread, because other tasks run on the thread. So a decorated
function is driven step by step. The current device belongs to its frame, as its local variables do: a suspend saves the
device that the code has made current, whatever made it so, and a resume restores that one.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

from devguard.guards import unwind
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

    __slots__ = ("_advance", "_device", "_held", "_inner", "_suspends", "_within")

    def __init__(self, within: AbstractContextManager[Any], inner: Any = None) -> None:
        self._within = within
        self._held: list[Entry] = []
        self._device = -1  # the device that `inner` has made current, where it is not the one of the scope
        self._suspends: type[BaseException] | None = None
        self._advance: Any = None
        self._inner: Any = None
        self.drive(inner)

    def drive(self, inner: Any, suspends: type[BaseException] | None = None) -> Steps:
        """Step `inner` from now on: the next step of an asynchronous generator, which has an awaitable for each.

        Parameters
        ----------
        inner : awaitable iterator
            The step.
        suspends : type, optional
            An exception by which `inner` ends where the generator is only suspended.
        """
        self._inner = inner
        self._advance = getattr(inner, "__next__", None)  # a coroutine has only send
        self._suspends = suspends
        return self

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
        stack = local.stack
        depth = len(stack)
        self._within.__enter__()
        outside = -1
        try:
            outside = stack[depth][2]
            if outside < 0 or self._device >= 0 or self._held:
                outside = self._resume(stack, depth, outside)
            result = resume(*arguments)
        except BaseException as error:
            ends = self._suspends is None or not isinstance(error, self._suspends)
            failing = not isinstance(error, (StopIteration, StopAsyncIteration))
            self._suspend(stack, depth, outside, ends, failing)
            raise
        self._suspend(stack, depth, outside, False, False)
        return result

    def _resume(self, stack: Stack, depth: int, outside: int) -> int:
        """Put the entries that `inner` holds back, and restore its device; return the device outside, -1 for unknown.

        A scope that takes no device leaves the one outside current, and gives it back only where `inner` has moved it.
        """
        held, self._held = self._held, []
        current = stack.take(self._device) if self._device >= 0 else stack.read()
        if outside < 0:
            outside = current
            for position, (within, owner, previous) in enumerate(held):
                if previous >= 0:  # the lowest that took a device gives back the one that is current outside now
                    held[position] = (within, owner, outside)
                    break
        if held:
            stack.extend(held)
            stack.judged = None
        return outside

    def _suspend(self, stack: Stack, depth: int, outside: int, ends: bool, failing: bool) -> None:
        """Take the entries of this step off, save the device of `inner`, and give back the one outside."""
        if len(stack) <= depth:
            unwind.report_missing()
            return
        entry = stack[depth]
        if len(stack) > depth + 1:  # a plain `with` inside is held across this suspend
            self._held = stack[depth + 1 :]
        del stack[depth:]
        owner, took = entry[1], entry[2] >= 0
        home = owner.index if took and owner is not None else max(outside, 0)
        inside = stack.give_back(outside) if took and outside != home else stack.restore(outside)
        self._device = inside if inside != home or (self._held and not took) else -1
        if stack.changes:
            if ends:
                unwind.judge_changes(stack, entry, inside, failing)
            else:  # suspended code may still undo them, and its device is given back now anyway
                stack.changes = [change for change in stack.changes if change.depth <= depth]


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
