"""Frameworks whose processes have roles: which GPU each of them owns is known without a line of the user's code.

One module or package for each framework. `arm` makes them wait for the framework's import; it imports none, nor torch.
"""

from __future__ import annotations

import importlib
import os

from devguard import modes
from devguard.support.notices import warn_user

__all__ = ["arm", "is_asked_for"]

NAMES = ("sglang", "vllm")


def arm() -> None:
    """Let every integration wait for its framework; called when devguard is activated by environment.

    Calling it again changes nothing. It never raises: an integration that cannot be armed is left out, with a warning.
    """
    for name in NAMES:
        try:
            importlib.import_module(f"{__name__}.{name}").arm()
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody's import of torch must go on
            warn_user(f"devguard does not know the processes of {name}: {type(error).__name__}: {error}")


def is_asked_for(whitelist: str) -> bool:
    """Tell whether a framework's plugin loader may load devguard, which it finds wherever that is installed.

    Parameters
    ----------
    whitelist : str
        The variable that names the plugins to load, such as ``"SGLANG_PLUGINS"``.

    Returns
    -------
    bool
        Whether ``DEVGUARD`` asks for a guard, or the whitelist names devguard; never with ``DEVGUARD=off``.
    """
    named = {name.strip() for name in os.environ.get(whitelist, "").split(",")}
    return not modes.killed() and ("devguard" in named or bool(os.environ.get("DEVGUARD", "").strip()))


def __getattr__(name: str) -> object:
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
