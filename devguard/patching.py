"""Replacing an attribute of torch, and putting it back.

A patch keeps what it found, is removed only if it is still ours, and tells when it is not.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from devguard.errors import DevGuardError

__all__ = ["DoorError", "Patches", "overwritten"]

_all: weakref.WeakSet[Patches] = weakref.WeakSet()


class DoorError(DevGuardError):
    """A door cannot be opened, because this torch does not have what it patches."""


class Patches:
    """The attributes that one door has replaced.

    Attributes
    ----------
    replaced : list
        One row ``(owner, name, original, ours)`` for each, in the order of replacing.
    """

    def __init__(self) -> None:
        self.replaced: list[tuple[Any, str, Any, Any]] = []
        _all.add(self)

    def find(self, owner: Any, name: str) -> Callable[..., Any]:
        """Return the callable to be replaced; raise `DoorError` if there is none."""
        original: Callable[..., Any] | None = vars(owner).get(name)
        if original is None:
            torch = sys.modules["torch"]
            where = getattr(owner, "__name__", repr(owner))
            raise DoorError(
                f"{where}.{name} is not in torch {torch.__version__}; this version of devguard does not know it."
            )
        return original

    def replace(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        """Replace ``owner.name``, keeping the names by which pickle and allow-lists know it."""
        original = self.find(owner, name)
        function = original.__func__ if isinstance(original, staticmethod) else original  # a class's __new__ is one
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(ours, attribute, getattr(function, attribute))
        ours.__wrapped__ = function  # type: ignore[attr-defined]
        self.replaced.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def restore(self) -> list[str]:
        """Put everything back; return the names that are no longer ours, which stay as they are."""
        left = []
        while self.replaced:
            owner, name, original, ours = self.replaced.pop()
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
            else:
                left.append(f"{getattr(owner, '__name__', owner)}.{name}")
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
        f"{getattr(owner, '__name__', owner)}.{name}"
        for patches in list(_all)
        for owner, name, _, ours in patches.replaced
        if vars(owner).get(name) is not ours
    }
