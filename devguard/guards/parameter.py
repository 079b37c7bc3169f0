"""The parameter of a decorated function that holds the device: ``guard(argument="gpu_id")``.

The device is read from what a caller passes, so the signature of the callable that is really called counts. A wrapper
that takes ``*args`` and ``**kwargs`` may add, drop or reorder arguments, so the signature of the function that it wraps
counts only where the wrapper passes them on unchanged, to that very function. Where that cannot be shown, decorating
fails.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from devguard.errors import ConfigError
from devguard.support import callsite

__all__ = ["find_parameter", "Parameter"]


_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


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


def find_parameter(function: Callable[..., Any], name: str) -> Parameter:
    """Return the parameter called `name` of `function`.

    Raises
    ------
    ConfigError
        If the function has no such parameter and takes no ``**kwargs`` that could hold it, or if it is a wrapper that
        may change the arguments.
    """
    if isinstance(function, functools.partial):
        return _of_partial(function, name)
    signature, reader = _own_signature(function)
    parameters = signature.parameters
    catch_all = False
    for position, parameter in enumerate(parameters.values()):
        if parameter.kind is parameter.VAR_KEYWORD:
            catch_all = True
        elif parameter.name == name and parameter.kind is not parameter.VAR_POSITIONAL:
            by_position = None if parameter.kind is parameter.KEYWORD_ONLY else position
            by_keyword = parameter.kind is not parameter.POSITIONAL_ONLY
            return Parameter(name, by_position, by_keyword, parameter.default)
    what = getattr(function, "__qualname__", repr(function))
    if hasattr(reader, "__wrapped__"):
        raise ConfigError(
            f"{what} is wrapped by a decorator that may pass other arguments on than it gets, so devguard cannot know "
            f"which one is {name!r}. Put @guard(argument={name!r}) below that decorator, directly on the function, or "
            f"give the decorator's own function a parameter {name!r}."
        )
    if catch_all:
        return Parameter(name, None, True, None)
    raise ConfigError(
        f"{what} has no parameter {name!r} to take the device from. It has: {', '.join(parameters) or 'none'}."
    )


def _of_partial(function: functools.partial[Any], name: str) -> Parameter:
    """Return the parameter of a partial object, which may supply a default for it."""
    inner = find_parameter(function.func, name)
    if inner.keyword and name in function.keywords:
        return Parameter(name, None, True, function.keywords[name])
    if inner.position is None:
        return inner
    position = inner.position - len(function.args)
    if position < 0:
        raise ConfigError(f"{function!r} passes {name!r} itself already, so no call can. Name the device in the guard.")
    return inner._replace(position=position)


def _own_signature(function: Callable[..., Any]) -> tuple[inspect.Signature, Callable[..., Any]]:
    """Return the signature by which a callable reads its arguments, and the callable that reads them.

    That is another one where wrappers pass them on unchanged.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and _passes_on(function):
        signature, reader = _own_signature(wrapped)
        if inspect.ismethod(function):
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # `self` is bound
        return signature, reader
    if wrapped is not None and type(function) not in (types.FunctionType, types.MethodType):
        call = type(function).__call__  # wrapt's proxies show the signature of what they wrap
        if not hasattr(call, "__code__"):
            return _ANYTHING, function
    return inspect.signature(function, follow_wrapped=False), function


def _passes_on(wrapper: Callable[..., Any]) -> bool:
    """Return whether a wrapper passes all of its arguments on unchanged."""
    if isinstance(wrapper, functools._lru_cache_wrapper):
        return True
    if type(wrapper) not in (types.FunctionType, types.MethodType):
        return False
    code = wrapper.__code__
    flags = code.co_flags
    is_open = flags & inspect.CO_VARARGS and flags & inspect.CO_VARKEYWORDS
    if not is_open or code.co_argcount or code.co_kwonlyargcount:
        return False
    # Wrappers of the standard library (mock.patch appends its mocks), of torch and of devguard change no position.
    return not callsite.is_user(code) or _is_transparent(wrapper)


def _is_transparent(wrapper: Callable[..., Any]) -> bool:
    """Return whether the source of a wrapper shows that the function it wraps gets just the wrapper's arguments.

    So each use of that function, of ``*args`` and of ``**kwargs`` must be one that changes nothing.
    """
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(wrapper.__code__))).body
    except (OSError, SyntaxError, ValueError, TypeError):
        return False
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    assert definition.args.vararg is not None
    assert definition.args.kwarg is not None
    args, kwargs = definition.args.vararg.arg, definition.args.kwarg.arg
    callees = _names_of_wrapped(wrapper)
    nodes = [node for statement in definition.body for node in ast.walk(statement)]
    names = {args, kwargs, *callees}
    if any(names & _bound(node) for node in nodes):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    passed = [name for call in calls for name in _passed(call, callees, args, kwargs)]
    allowed = {id(name) for name in passed} | _read(nodes, callees, args)
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id in names]
    return bool(passed) and all(id(name) in allowed for name in uses)


def _names_of_wrapped(wrapper: Any) -> set[str]:
    """Return the names by which the code of a wrapper reaches the very function that it wraps."""
    function = getattr(wrapper, "__func__", wrapper)
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    found = set()
    for name in {*code.co_freevars, *code.co_names}:
        try:
            value = cells[name].cell_contents if name in cells else function.__globals__[name]
        except (KeyError, ValueError):  # a built-in name or an attribute, or a cell without a value
            continue
        if value is function.__wrapped__:
            found.add(name)
    return found


def _bound(node: ast.AST) -> set[str]:
    """Return the names that a node binds, apart from assignments: nested functions and their parameters, imports."""
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        return set(node.names)
    fields = () if isinstance(node, ast.keyword) else ("name", "asname", "arg", "rest")
    return {name for field in fields if isinstance(name := getattr(node, field, None), str)}


def _passed(call: ast.Call, callees: set[str], args: str, kwargs: str) -> list[ast.Name]:
    """Return the three names of ``function(*args, **kwargs)``; nothing for another call."""
    if not len(call.args) == len(call.keywords) == 1 or call.keywords[0].arg is not None:
        return []
    first = call.args[0]
    parts = (call.func, first.value if isinstance(first, ast.Starred) else None, call.keywords[0].value)
    names = [node for node in parts if isinstance(node, ast.Name)]
    is_exact = len(names) == 3 and names[0].id in callees and [name.id for name in names[1:]] == [args, kwargs]
    return names if is_exact else []


def _read(nodes: list[ast.AST], callees: set[str], args: str) -> set[int]:
    """Return the identities of the names that are only read: a function's own name, and arguments that are logged."""
    found = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in functools.WRAPPER_ASSIGNMENTS}
    found |= {id(node.value) for node in nodes if isinstance(node, ast.FormattedValue)}
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.update(id(value) for value in node.value.args if isinstance(value, ast.Name) and value.id == args)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("len", "repr", "str"):
            found.update(id(value) for value in node.args)
    return found
