"""Integrations with frameworks: they find the GPU of each worker process without a change to the user's code.

Each framework has a module or package. `arm` waits for the framework's import, and imports neither it nor torch.
"""

from __future__ import annotations

import importlib
import os
import sys

from devguard import modes
from devguard.support.notices import warn_user

__all__ = ["arm", "arm_transport", "disarm", "is_asked_for"]

NAMES = ("sglang", "vllm")


def arm() -> None:
    """Make every integration wait for the import of its framework; called when the environment activates devguard.

    A second call changes nothing. `arm` never raises: an integration that cannot be armed is skipped with a warning.
    """
    for name in NAMES:
        try:
            importlib.import_module(f"{__name__}.{name}").arm()
        except Exception as error:  # noqa: BLE001 - an error here would make `import torch` fail
            warn_user(f"devguard's integration with {name} is off: {type(error).__name__}: {error}")


def arm_transport() -> None:
    """Apply ``DEVGUARD_TRANSPORT`` where ``DEVGUARD`` asks for no guard; otherwise `arm` does so.

    Raises
    ------
    ConfigError
        If a variable is not valid.
    """
    importlib.import_module(f"{__name__}.sglang.host_transport").arm_if_asked()


def disarm() -> list[str]:
    """Restore the functions of every framework; return the names that other code has patched over devguard."""
    left: list[str] = []
    for name in NAMES:
        module = sys.modules.get(f"{__name__}.{name}")
        if module is not None:  # otherwise it was never armed
            left += module.disarm()
    return left


def is_asked_for(whitelist: str) -> bool:
    """Return whether the environment requests devguard; a framework's plugin loader finds it wherever it is installed.

    Parameters
    ----------
    whitelist : str
        The environment variable that names the plugins to load, such as ``"SGLANG_PLUGINS"``.

    Returns
    -------
    bool
        True if ``DEVGUARD`` is set or the whitelist names devguard; always False with ``DEVGUARD=off``.
    """
    named = {name.strip() for name in os.environ.get(whitelist, "").split(",")}
    return not modes.is_killed() and ("devguard" in named or bool(os.environ.get("DEVGUARD", "").strip()))


def __getattr__(name: str) -> object:
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
