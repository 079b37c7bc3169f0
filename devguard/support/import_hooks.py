"""Patches of modules that may be imported later, or never.

A door that patches a library must not import the library. wrapt calls a hook when a module is imported, but cannot
remove the hook. So one hook is registered for each patch and module, once per process, and the patch itself checks
whether its door is open. A patch must not raise, because the error would break the program's import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import wrapt

__all__ = ["when_imported"]

_waiting: set[tuple[str, Callable[[ModuleType], None]]] = set()


def when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Call ``patch(module)``: now if the module `name` is imported already, otherwise when it is imported.

    Parameters
    ----------
    name : str
        The module's full name. This function does not import the module.
    patch : callable
        Stays registered for good, so pass a function of a module, not a closure.
    """
    module = sys.modules.get(name)
    if module is not None:
        patch(module)
    elif (name, patch) not in _waiting:
        _waiting.add((name, patch))
        wrapt.register_post_import_hook(patch, name)
