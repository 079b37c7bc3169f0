"""What a decorated plain function returns, if it is code that runs later: that code runs inside the scope as well.

A plain function may return a coroutine, a generator, an asynchronous generator, or a context manager of ``contextlib``
that runs a generator; many decorators do. Each comes back as an object of the same kind. Someone else may hold what is
inside it, too: then dropping the object leaves that alone. Every other awaitable is returned unchanged and reported.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from devguard.guards.coroutines import Steps
from devguard.guards.decorate import (
    DecoratingScope,
    decorate_async_generator,
    decorate_coroutine,
    decorate_generator,
)
from devguard.ownership.stack import Entry
from devguard.support import callsite
from devguard.support.notices import warn_user

__all__ = ["is_later", "PLAIN", "within"]


# Results of most calls: one look-up, in the hot path of a decorated call.
PLAIN = frozenset((type(None), bool, int, float, str, bytes, tuple, list, dict))
_NATIVE = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)
_LATER = frozenset(_NATIVE)
_reported: set[str] = set()
_MAX_REPORTS = 256
# The entries of its scopes and the device that suspended code holds, where its steps are gone.
_left: weakref.WeakKeyDictionary[Any, tuple[list[Entry], int]] = weakref.WeakKeyDictionary()


def is_later(result: Any) -> bool:
    """Return whether the result of a call is code that runs later; quick for other results."""
    kind = type(result)
    # Not isinstance: the context managers are abstract base classes, a check for which takes a microsecond.
    try:
        may_be = kind in _LATER or hasattr(kind, "__await__") or hasattr(kind, "_recreate_cm")
    except Exception:  # noqa: BLE001 - the metaclass raises
        may_be = True
    return may_be and (issubclass(kind, _NATIVE) or _defines(kind, "__await__") or _defines(kind, "_recreate_cm"))


def _defines(kind: type, name: str) -> bool:
    """Return whether a class has an attribute, without its metaclass, which may answer anything."""
    look_up = type.__getattribute__
    return any(name in look_up(base, "__dict__") for base in look_up(kind, "__mro__"))


def within(scope: DecoratingScope, result: Any, function: Any) -> Any:
    """Return `result`, the code that `function` returned, such that it runs inside `scope` (resolved already)."""
    kind = type(result)
    if issubclass(kind, contextlib._GeneratorContextManager):
        return _enclosed(scope, result, decorate_generator)
    if issubclass(kind, contextlib._AsyncGeneratorContextManager):
        return _enclosed(scope, result, decorate_async_generator)
    if issubclass(kind, _NATIVE):
        return _around(scope, result)
    if _defines(kind, "get_coro") or not (_defines(kind, "_asyncio_future_blocking") or _defines(kind, "_recreate_cm")):
        _report(scope, kind, function)
    return result


def _enclosed(scope: DecoratingScope, manager: Any, decorate: Callable[..., Any]) -> Any:
    """Return a context manager of which the generator runs inside `scope`, as do those that it makes as a decorator."""
    made = copy.copy(manager)
    made.gen = _around(scope, manager.gen)
    made.func = decorate(scope, manager.func, None)
    return made


def _around(scope: DecoratingScope, code: Any) -> Any:
    """Return an object of the kind of `code`, and of its name, that runs it inside `scope`."""
    returned: Any = _Returned(scope, code)  # stands for the scope and for the function
    if isinstance(code, types.CoroutineType):
        made = decorate_coroutine(returned, returned, None)()
    elif isinstance(code, types.AsyncGeneratorType):
        made = decorate_async_generator(returned, returned, None)()
    else:
        make = decorate_generator(returned, returned, None)
        made = (types.coroutine(make) if code.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE else make)()
    made.__name__, made.__qualname__ = code.__name__, code.__qualname__
    # With a callback, because Python 3.14 clears the other references only after it has finalised a cycle.
    returned.around = weakref.ref(made, lambda _: None)
    return made


class _Returned:
    """Code that a function returned, until its first step; for `decorate` the function that makes it, and the scope.

    Parameters
    ----------
    scope : DecoratingScope
        The scope.
    code : coroutine, generator or asynchronous generator
        The code.
    """

    __slots__ = ("around", "code", "scope")  # no __dict__, which functools.wraps would copy

    def __init__(self, scope: DecoratingScope, code: Any) -> None:
        self.scope = scope
        self.code = code
        self.around: Callable[[], Any] = lambda: None

    def resolved(self, *call: Any) -> _Returned:
        """Return this object: the owner is known."""
        return self

    def steps(self, inner: Any) -> Steps:
        """Return the steps of a coroutine or generator; those of an asynchronous generator are given to them later."""
        return self.scope.steps(None) if inner is None else _SharedSteps(self.scope, inner, self.around)

    def look_after(self, function: Callable[..., Any]) -> None:
        """Look for contexts that no door explains."""
        self.scope.look_after(function)

    def __call__(self) -> Any:
        """Return the code, and let go of it."""
        code, self.code = self.code, None
        return _SharedAsyncGenerator(code, self.around) if isinstance(code, types.AsyncGeneratorType) else code

    def __del__(self) -> None:
        """Close or drop code that was not stepped here: a coroutine is reported once, not with the one around it."""
        if self.code is None or isinstance(self.code, types.AsyncGeneratorType):
            return
        is_coroutine = isinstance(self.code, types.CoroutineType)
        state = inspect.getcoroutinestate(self.code) if is_coroutine else inspect.getgeneratorstate(self.code)
        is_last = is_coroutine and state == inspect.CORO_CREATED and sys.getrefcount(self.code) == _ONE
        suspended = state in (inspect.CORO_SUSPENDED, inspect.GEN_SUSPENDED)
        with self.scope if suspended else contextlib.nullcontext():
            if is_last or self.around() is not None:
                self.code.close()
            self.code = None


_ONE = 2  # what sys.getrefcount returns for an attribute that nothing else refers to


class _SharedSteps(Steps):
    """The steps of code that someone else may hold.

    Where the object around the code is dropped, not closed, the code is let go of: then it ends, inside the scope, if
    nothing else holds it. Python has cleared the reference to an object when it finalises it.
    """

    __slots__ = ("_around",)

    def __init__(self, scope: DecoratingScope, code: Any, around: Callable[[], Any]) -> None:
        super().__init__(scope, code)
        self._around = around
        self._held, self._device = _left.pop(code, ([], -1))

    def close(self) -> None:
        """Close the code inside the scope, or let go of it there."""
        if self._around() is not None:
            super().close()
            return
        code = weakref.ref(self._inner)
        self._step(self._let_go)
        if (self._held or self._device >= 0) and (left := code()) is not None:
            _left[left] = (self._held, self._device)

    def _let_go(self) -> None:
        self._inner = self._advance = None


class _SharedAsyncGenerator:
    """An asynchronous generator that someone else may hold: it is closed where it is told so, or is held here only."""

    __slots__ = ("_around", "_code")

    def __init__(self, code: Any, around: Callable[[], Any]) -> None:
        self._code = code
        self._around = around

    def __anext__(self) -> Any:
        return self._code.__anext__()

    def asend(self, value: Any) -> Any:
        """Resume with `value`."""
        return self._code.asend(value)

    def athrow(self, *error: Any) -> Any:
        """Raise in the generator."""
        return self._code.athrow(*error)

    async def aclose(self) -> None:
        """Close the generator, unless the one around it is dropped and someone else holds this one."""
        if self._around() is not None or sys.getrefcount(self._code) == _ONE:
            await self._code.aclose()


def _report(scope: DecoratingScope, kind: type, function: Any) -> None:
    name = callsite.name_of(function)
    if name not in _reported and len(_reported) < _MAX_REPORTS:
        _reported.add(name)
        is_task = _defines(kind, "get_coro")
        what = type.__getattribute__(kind, "__name__")
        runs = "which an event loop steps" if is_task else "which runs when it is awaited,"
        remedy = (
            f"make the task with asyncio.create_task({scope!r}.run(coroutine))"
            if is_task
            else f"await it with `await {scope!r}.run(awaitable)`"
        )
        warn_user(
            f"{name} is decorated with {scope!r} and returned an object of type {what}, {runs} outside that scope. "
            f"Decorate the coroutine function that runs in it, or {remedy}.",
            level=5,
        )
