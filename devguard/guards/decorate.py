"""Decorators: a scope around every call of a function, method, coroutine, generator or asynchronous generator.

A decorated function is a native function of the same kind, made with ``functools.wraps``: it pickles by its qualified
name as the target of a spawned process, and cloudpickle ships it by value with its scope. For that, the wrappers below
close over the scope and the function only, and reach everything else through them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from devguard.guards.coroutines import Steps, unregistered
from devguard.guards.parameter import Parameter, find_parameter

__all__ = ["decorate_async_generator", "decorate_coroutine", "decorate_generator", "DecoratingScope", "wrap"]


class DecoratingScope(Protocol):
    """A scope that can decorate: see `devguard.guards.base.Scope`."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def is_resolved(self) -> bool: ...

    def resolved(
        self, parameter: Parameter | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> DecoratingScope: ...

    def steps(self, inner: Any) -> Steps: ...

    def after_call(self, function: Callable[..., Any], result: Any) -> Any: ...

    def look_after(self, function: Callable[..., Any]) -> None: ...


def wrap(scope: DecoratingScope, function: Any, argument: str | None) -> Any:
    """Return `function` with each call inside `scope`.

    Parameters
    ----------
    scope : DecoratingScope
        The scope.
    function : callable, staticmethod or classmethod
        The function to decorate.
    argument : str, optional
        The name of the parameter that holds the device.
    """
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(wrap(scope, function.__func__, argument))
    if isinstance(function, functools.partialmethod):
        inner = wrap(scope, function.func, argument)
        return functools.partialmethod(inner, *function.args, **function.keywords)
    name = type(scope).__name__
    if inspect.isclass(function):
        raise TypeError(
            f"{name} decorates functions and methods, not the class {function.__qualname__}. Decorate its methods, or "
            f"make the object inside `with {name}(...)`."
        )
    if not callable(function):
        raise TypeError(f"{name} decorates functions and methods, not {function!r}.")
    parameter = None if argument is None else find_parameter(function, argument)
    if _is(inspect.isasyncgenfunction, function):
        return decorate_async_generator(scope, function, parameter)
    if _is(inspect.iscoroutinefunction, function):
        return decorate_coroutine(scope, function, parameter)
    if _is(inspect.isgeneratorfunction, function):
        wrapped = decorate_generator(scope, function, parameter)
        flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
        return types.coroutine(wrapped) if flags & inspect.CO_ITERABLE_COROUTINE else wrapped
    return _function(scope, function, parameter)


def _is(kind: Callable[[object], bool], function: Any) -> bool:
    """Return whether a function, or the ``__call__`` of an object, is of that kind."""
    return kind(function) or kind(type(function).__call__)


def _function(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    is_resolved = scope.is_resolved  # else once for a call, and for the code that it may return

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        within = scope if is_resolved else scope.resolved(parameter, args, kwargs)
        with within:
            result = function(*args, **kwargs)
        return within.after_call(function, result)

    _keep_methods(wrapper, function)
    return wrapper


def _keep_methods(wrapper: Any, function: Any) -> None:
    """Give a decorated callable object's public methods to its wrapper, such as the ``cache_info`` of a cache."""
    if isinstance(function, (types.FunctionType, types.MethodType)):
        return
    for kind in type(function).__mro__:
        for name, value in vars(kind).items():
            is_method = isinstance(value, (types.FunctionType, types.MethodDescriptorType))
            if is_method and not name.startswith("_") and not hasattr(wrapper, name):
                setattr(wrapper, name, value.__get__(function, kind))


def decorate_coroutine(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    """Return a coroutine function with each step inside `scope`."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return await scope.resolved(parameter, args, kwargs).steps(function(*args, **kwargs))
        finally:
            scope.look_after(function)

    return wrapper


def decorate_generator(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    """Return a generator function with each step inside `scope`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return (yield from scope.resolved(parameter, args, kwargs).steps(function(*args, **kwargs)))
        finally:
            scope.look_after(function)

    return wrapper


def decorate_async_generator(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    """Return an asynchronous generator function with each step inside `scope`."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        steps = scope.resolved(parameter, args, kwargs).steps(None)
        inner = function(*args, **kwargs)
        step = unregistered(inner)
        try:
            while True:
                try:
                    item = await steps.drive(step, suspends=StopIteration)
                except StopAsyncIteration:
                    return
                try:
                    sent = yield item
                except GeneratorExit:
                    step = inner.aclose()  # the step before refers to the generator
                    await steps.drive(step)
                    raise
                except BaseException as error:  # noqa: BLE001 - whatever is thrown in belongs to the generator
                    step = inner.athrow(error)
                else:
                    step = inner.asend(sent)
        finally:
            scope.look_after(function)

    return wrapper
