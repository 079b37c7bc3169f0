"""Patching modules that may be imported later, or never.

A door that patches a library must not import it. wrapt tells when a module is imported, but its hooks cannot be taken
back: so one is registered for each patch and module, once in a process, and the patch itself asks whether its door is
open. A patch must not raise: it would break somebody's import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import wrapt

__all__ = ["when_imported"]

_waiting: set[tuple[str, Callable[[ModuleType], None]]] = set()


def when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Call ``patch(module)``: now if the module `name` has been imported, else as soon as it is.

    Parameters
    ----------
    name : str
        The module's full name. It is not imported.
    patch : callable
        A function of its own module, which stays registered for good.
    """
    module = sys.modules.get(name)
    if module is not None:
        patch(module)
    elif (name, patch) not in _waiting:
        _waiting.add((name, patch))
        wrapt.register_post_import_hook(patch, name)
