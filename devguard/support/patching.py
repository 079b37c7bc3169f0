"""Patches of torch's and Python's attributes, and of items of their tables.

A patch keeps the original, and is removed only if the attribute still holds the patch. Otherwise its name is reported.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from devguard.errors import DevGuardError
from devguard.support.installed_torch import SUPPORTED

__all__ = ["DoorError", "original_of", "overwritten", "Parameters", "Patches", "unsupported"]

_all: weakref.WeakSet[Patches] = weakref.WeakSet()
# Patch -> original, of patches that other code had replaced when they were to be removed, and may put back, as
# ``unittest.mock.patch`` does at its end.
_outlived: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class DoorError(DevGuardError):
    """A door cannot be opened, because this release of a library lacks a function that the door patches."""


def unsupported(target: str, reason: str) -> DoorError:
    """Return the error for a function that a door cannot patch.

    Parameters
    ----------
    target : str
        The function, such as ``"torch.frombuffer"``.
    reason : str
        Why not; it follows the name and the version of the library.
    """
    root = target.partition(".")[0]
    library = root if root in sys.modules else "torch"
    if library in sys.stdlib_module_names:
        found = f"Python {sys.version.partition(' ')[0]}"
    else:
        found = f"{library} {getattr(sys.modules.get(library), '__version__', '')}".rstrip()
    supported = f" (devguard supports {SUPPORTED})" if library == "torch" else ""
    return DoorError(
        f"cannot watch {target}: {found} {reason}{supported}. This door stays closed, the others are open."
    )


class Parameters:
    """The positions of some parameters of a function, found by name.

    Raises
    ------
    DoorError
        If the function lacks one of `names`.
    """

    def __init__(self, function: Callable[..., Any], *names: str) -> None:
        self.signature = inspect.signature(function)
        order = list(self.signature.parameters)
        missing = [name for name in names if name not in order]
        if missing:
            name = f"{function.__module__}.{function.__qualname__}"
            raise unsupported(name, f"has no parameter {', '.join(missing)} there")
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
        """Return the arguments with `value` in place of the argument `name`."""
        at = self.at[name]
        return (*args[:at], value, *args[at + 1 :])


class Patches:
    """The attributes, and items of dictionaries, that one door has replaced.

    Attributes
    ----------
    replaced : list
        One row ``(owner, name, original, ours)`` for each patch, oldest first; the owner may be a dictionary.
    """

    def __init__(self) -> None:
        self.replaced: list[tuple[Any, Any, Any, Any]] = []
        _all.add(self)

    def find(self, owner: Any, name: Any, *, inherited: bool = False) -> Callable[..., Any]:
        """Return the callable to replace, with `inherited` also one of a base; raise `DoorError` if there is none.

        A patch of devguard that outlived its removal is no original, since one call would then pass two patches.
        """
        original: Callable[..., Any] | None = original_of(_found(owner, name))
        if original is None and inherited:
            original = _inherited(owner, name)
        if original is None:
            raise unsupported(_full_name(owner, name), "has no such function")
        return original

    def replace(self, owner: Any, name: Any, ours: Any, *, inherited: bool = False) -> None:
        """Replace ``owner.name``, keeping the names by which pickle and allow-lists know it.

        With `inherited`, the class `owner` may have it from a base; the attribute of the base stays as it is.
        """
        original = self.find(owner, name, inherited=inherited)
        function = _function(original)  # as __new__
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            if hasattr(function, attribute):  # a mock may lack it
                setattr(ours, attribute, getattr(function, attribute))
        if _found(owner, name) is None:
            ours.__module__, ours.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
        ours.__wrapped__ = function
        if function is not original and name != "__new__":
            kind: Any = type(original)
            ours = kind(ours)
        self.replaced.append((owner, name, original, ours))
        _put(owner, name, ours)

    def has(self, owner: Any) -> bool:
        """Return whether an attribute of `owner` is replaced."""
        return any(patched is owner for patched, _, _, _ in self.replaced)

    def restore(self) -> list[str]:
        """Restore the originals; return the names that hold a foreign patch by now, which stay as they are.

        An interrupted call can be repeated: a patch is forgotten only after it is removed.
        """
        left = []
        while self.replaced:
            owner, name, original, ours = self.replaced[-1]
            found, base = _found(owner, name), _inherited(owner, name)
            if found is ours and base is original:
                delattr(owner, name)
            elif found is ours:
                _put(owner, name, original)
            elif _function(found) in _outlived:  # an earlier patch of devguard that came back
                _put(owner, name, original_of(found))
            elif found is not original and not (found is None and base is original):  # else an interrupt came first
                _outlived[_function(ours)] = original
                left.append(_label(owner, name))
            self.replaced.pop()
        return left

    def early_copies(self) -> list[str]:
        """Return the module attributes that still hold an original, as after ``from torch import frombuffer``.

        Calls through them bypass the door. The search reads all of ``sys.modules``, so it is for reports only.
        """
        originals = {id(getattr(original, "__func__", original)) for _, _, original, _ in self.replaced}
        held = []
        for module_name, module in list(sys.modules.items()):
            if type(module) is not ModuleType or module_name.partition(".")[0] in ("torch", "devguard"):
                continue
            held += [f"{module_name}.{name}" for name, value in list(vars(module).items()) if id(value) in originals]
        return sorted(held)


def original_of(found: Any) -> Any:
    """Return `found`, or the original in its place if it is a patch that outlived its removal."""
    while _function(found) in _outlived:
        found = _outlived[_function(found)]
    return found


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def overwritten() -> set[str]:
    """Return the patched attributes, of all doors, that other code has replaced since."""
    return {
        _label(owner, name)
        for patches in list(_all)
        for owner, name, _, ours in patches.replaced
        if _found(owner, name) is not ours
    }


def _found(owner: Any, name: Any) -> Any:
    return owner.get(name) if isinstance(owner, dict) else vars(owner).get(name)


def _inherited(owner: Any, name: Any) -> Any:
    """Return what a class would have from its bases."""
    bases = owner.__mro__[1:] if isinstance(owner, type) else ()
    return next((vars(base)[name] for base in bases if name in vars(base)), None)


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _label(owner: Any, name: Any) -> str:
    if isinstance(owner, dict):
        return f"the entry of {getattr(name, '__name__', name)} in a table"
    return f"{getattr(owner, '__name__', owner)}.{name}"


def _full_name(owner: Any, name: Any) -> str:
    """Return the name of a function with its module, for an error message."""
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return _label(owner, name)
