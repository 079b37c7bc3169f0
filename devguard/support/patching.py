"""Replacing an attribute of torch, or an item of one of its tables, and putting it back.

A patch keeps what it found, is removed only if it is still ours, and tells when it is not.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from devguard.errors import DevGuardError

__all__ = ["DoorError", "Parameters", "Patches", "overwritten"]

_all: weakref.WeakSet[Patches] = weakref.WeakSet()


class DoorError(DevGuardError):
    """A door cannot be opened, because this torch does not have what it patches."""


class Parameters:
    """Where the parameters of one of torch's functions are: found by name, whatever their order.

    Raises
    ------
    DoorError
        If one of `names` is not there.
    """

    def __init__(self, function: Callable[..., Any], *names: str) -> None:
        self.signature = inspect.signature(function)
        order = list(self.signature.parameters)
        missing = [name for name in names if name not in order]
        if missing:
            raise DoorError(
                f"{function.__module__}.{function.__qualname__} of torch {sys.modules['torch'].__version__} has no "
                f"parameter {', '.join(missing)}; this version of devguard does not know it."
            )
        self.count = len(order)
        self.at = {name: order.index(name) for name in names}

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return all arguments of a call, in order."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def value(self, args: tuple[Any, ...], name: str) -> Any:
        """Return the argument `name`."""
        return args[self.at[name]]

    def changed(self, args: tuple[Any, ...], name: str, value: Any) -> tuple[Any, ...]:
        """Return the arguments with another value of `name`."""
        at = self.at[name]
        return (*args[:at], value, *args[at + 1 :])


class Patches:
    """The attributes, and items of dictionaries, that one door has replaced.

    Attributes
    ----------
    replaced : list
        One row ``(owner, name, original, ours)`` for each, in the order of replacing; the owner may be a dictionary.
    """

    def __init__(self) -> None:
        self.replaced: list[tuple[Any, Any, Any, Any]] = []
        _all.add(self)

    def find(self, owner: Any, name: Any) -> Callable[..., Any]:
        """Return the callable to be replaced; raise `DoorError` if there is none."""
        original: Callable[..., Any] | None = _found(owner, name)
        if original is None:
            torch = sys.modules["torch"]
            raise DoorError(
                f"{_label(owner, name)} is not in torch {torch.__version__}; this version of devguard does not know it."
            )
        return original

    def replace(self, owner: Any, name: Any, ours: Callable[..., Any]) -> None:
        """Replace ``owner.name``, keeping the names by which pickle and allow-lists know it."""
        original = self.find(owner, name)
        function = original.__func__ if isinstance(original, staticmethod) else original  # a class's __new__ is one
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(ours, attribute, getattr(function, attribute))
        ours.__wrapped__ = function  # type: ignore[attr-defined]
        self.replaced.append((owner, name, original, ours))
        _put(owner, name, ours)

    def restore(self) -> list[str]:
        """Put everything back; return the names that are no longer ours, which stay as they are."""
        left = []
        while self.replaced:
            owner, name, original, ours = self.replaced.pop()
            if _found(owner, name) is ours:
                _put(owner, name, original)
            else:
                left.append(_label(owner, name))
        return left

    def early_copies(self) -> list[str]:
        """Return the module attributes that still hold an original, as after ``from torch import frombuffer``.

        Calls through them pass the door by. Looks through ``sys.modules``, so it is for reports only.
        """
        originals = {id(original) for _, _, original, _ in self.replaced}
        held = []
        for module_name, module in list(sys.modules.items()):
            if type(module) is not ModuleType or module_name.partition(".")[0] in ("torch", "devguard"):
                continue
            held += [f"{module_name}.{name}" for name, value in list(vars(module).items()) if id(value) in originals]
        return sorted(held)


def overwritten() -> set[str]:
    """Return the names of all patched attributes over which somebody else has patched since, in any door."""
    return {
        _label(owner, name)
        for patches in list(_all)
        for owner, name, _, ours in patches.replaced
        if _found(owner, name) is not ours
    }


def _found(owner: Any, name: Any) -> Any:
    return owner.get(name) if isinstance(owner, dict) else vars(owner).get(name)


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _label(owner: Any, name: Any) -> str:
    if isinstance(owner, dict):
        return f"the entry of {getattr(name, '__name__', name)} in a table"
    return f"{getattr(owner, '__name__', owner)}.{name}"
