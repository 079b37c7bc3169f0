"""What a decorated plain function returns, if it is code that runs later: that code runs inside the scope as well.

A plain function may return a coroutine, a generator, an asynchronous generator, or a context manager of ``contextlib``
that runs a generator; many decorators do. Each comes back as an object of the same kind. A task is stepped by its event
loop, outside the scope, which is reported.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from devguard.guards.decorate import (
    DecoratingScope,
    decorate_async_generator,
    decorate_coroutine,
    decorate_generator,
)
from devguard.support.notices import warn_user

__all__ = ["is_later", "PLAIN", "within"]


# Results of most calls: one look-up, in the hot path of a decorated call.
PLAIN = frozenset((type(None), bool, int, float, str, bytes, tuple, list, dict))
_LATER = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)
_reported: set[str] = set()
_MAX_REPORTS = 256


def is_later(result: Any) -> bool:
    """Return whether the result of a call is code that runs later; quick for other results."""
    kind = type(result)
    # Not isinstance: the context managers are abstract base classes, a check for which takes a microsecond.
    return kind in _LATER or hasattr(kind, "__await__") or hasattr(kind, "_recreate_cm")


def within(scope: DecoratingScope, result: Any, function: Any) -> Any:
    """Return `result`, the code that `function` returned, such that it runs inside `scope`."""
    scope = scope.resolved(None, (), {})
    if isinstance(result, contextlib._GeneratorContextManager):
        _enclose(result, functools.partial(decorate_generator, scope))
    elif isinstance(result, contextlib._AsyncGeneratorContextManager):
        _enclose(result, functools.partial(decorate_async_generator, scope))
    elif isinstance(result, types.GeneratorType):
        make = decorate_generator(scope, _Returned(result), None)
        return (types.coroutine(make) if result.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE else make)()
    elif isinstance(result, types.AsyncGeneratorType):
        return decorate_async_generator(scope, _Returned(result), None)()
    elif isinstance(result, collections.abc.Coroutine):
        return decorate_coroutine(scope, _Returned(result), None)()
    elif hasattr(result, "get_coro") or not (
        hasattr(result, "_asyncio_future_blocking") or hasattr(result, "_recreate_cm")
    ):
        _report(scope, result, function)
    return result


class _Returned:
    """A function that returns `inner`, under the name of the function that made it.

    A coroutine that is closed before its first step, or dropped, is reported once by Python: the one around `inner`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for name in ("__name__", "__qualname__"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def __call__(self) -> Any:
        return self.inner

    def __del__(self) -> None:
        if inspect.iscoroutine(self.inner) and inspect.getcoroutinestate(self.inner) == inspect.CORO_CREATED:
            self.inner.close()


def _enclose(manager: Any, decorate: Callable[..., Any]) -> None:
    """Decorate the generator of a context manager, and those that it makes where it is used as a decorator."""
    manager.gen = decorate(_Returned(manager.gen), None)()
    manager.func = decorate(manager.func, None)


def _report(scope: DecoratingScope, result: Any, function: Any) -> None:
    name = getattr(function, "__qualname__", type(function).__name__)
    if name not in _reported and len(_reported) < _MAX_REPORTS:
        _reported.add(name)
        warn_user(
            f"{name} is decorated with {scope!r} and returned a {type(result).__name__}, which an event loop steps "
            f"outside that scope. Decorate the coroutine function that the task runs, or make the task with "
            f"asyncio.create_task({scope!r}.run(coroutine)).",
            level=4,
        )
