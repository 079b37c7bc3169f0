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
from typing import Any, NamedTuple, Protocol

from devguard.errors import ConfigError
from devguard.guards.coroutines import Steps, unregistered

__all__ = ["Parameter", "wrap"]


class Parameter(NamedTuple):
    """The parameter of a function that holds the device.

    Attributes
    ----------
    name : str
        Its name.
    position : int or None
        Its index among the positional arguments; None if it is keyword-only.
    keyword : bool
        Whether it may be passed by keyword.
    default : object
        Its default; `inspect.Parameter.empty` if it has none.
    """

    name: str
    position: int | None
    keyword: bool
    default: Any

    def value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a call passes for it, by keyword, by position or by default.

        Raises
        ------
        TypeError
            If the call passes nothing for a parameter without a default.
        """
        if self.keyword and self.name in kwargs:
            return kwargs[self.name]
        if self.position is not None and self.position < len(args):
            return args[self.position]
        if self.default is inspect.Parameter.empty:
            raise TypeError(f"missing a required argument: {self.name!r}")
        return self.default


class DecoratingScope(Protocol):
    """A scope that can decorate: see `devguard.guards.base.Scope`."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def resolved(
        self, parameter: Parameter | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> DecoratingScope: ...

    def steps(self, inner: Any) -> Steps: ...

    def after_call(self, function: Callable[..., Any]) -> None: ...


def find_parameter(function: Callable[..., Any], name: str) -> Parameter:
    """Return the parameter called `name` of `function`.

    Raises
    ------
    ConfigError
        If the function has no such parameter and takes no ``**kwargs`` that could hold it.
    """
    parameters = inspect.signature(function).parameters
    catch_all = False
    for position, parameter in enumerate(parameters.values()):
        if parameter.kind is parameter.VAR_KEYWORD:
            catch_all = True
        elif parameter.name == name and parameter.kind is not parameter.VAR_POSITIONAL:
            by_position = None if parameter.kind is parameter.KEYWORD_ONLY else position
            by_keyword = parameter.kind is not parameter.POSITIONAL_ONLY
            return Parameter(name, by_position, by_keyword, parameter.default)
    if catch_all:
        return Parameter(name, None, True, None)
    what = getattr(function, "__qualname__", repr(function))
    raise ConfigError(
        f"{what} has no parameter {name!r} to take the device from. It has: {', '.join(parameters) or 'none'}."
    )


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
        return _async_generator(scope, function, parameter)
    if _is(inspect.iscoroutinefunction, function):
        return _coroutine(scope, function, parameter)
    if _is(inspect.isgeneratorfunction, function):
        wrapped = _generator(scope, function, parameter)
        flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
        return types.coroutine(wrapped) if flags & inspect.CO_ITERABLE_COROUTINE else wrapped
    return _function(scope, function, parameter)


def _is(kind: Callable[[object], bool], function: Any) -> bool:
    """Return whether a function, or the ``__call__`` of an object, is of that kind."""
    return kind(function) or kind(type(function).__call__)


def _function(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with scope if parameter is None else scope.resolved(parameter, args, kwargs):
            result = function(*args, **kwargs)
        scope.after_call(function)
        return result

    return wrapper


def _coroutine(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await scope.resolved(parameter, args, kwargs).steps(function(*args, **kwargs))

    return wrapper


def _generator(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (yield from scope.resolved(parameter, args, kwargs).steps(function(*args, **kwargs)))

    return wrapper


def _async_generator(scope: DecoratingScope, function: Callable[..., Any], parameter: Parameter | None) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        steps = scope.resolved(parameter, args, kwargs).steps(None)
        inner = function(*args, **kwargs)
        step = unregistered(inner)
        while True:
            try:
                item = await steps.drive(step, suspends=StopIteration)
            except StopAsyncIteration:
                return
            try:
                sent = yield item
            except GeneratorExit:
                await steps.drive(inner.aclose())
                raise
            except BaseException as error:  # noqa: BLE001 - whatever is thrown in belongs to the generator
                step = inner.athrow(error)
            else:
                step = inner.asend(sent)

    return wrapper
