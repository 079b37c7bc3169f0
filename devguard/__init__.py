"""devguard keeps each process of a multi-GPU PyTorch program on its own GPU.

Name the device that a process owns, once. Work that would land on another device is repaired or refused, and the line
of code that caused it is reported. Importing this package imports neither torch nor wrapt, and patches nothing.

>>> with devguard.guard("cuda:1"):
...     state = torch.load("checkpoint.pt")

PYTEST_DONT_REWRITE: avoids pytest's warning when devguard is imported before pytest.
"""

from __future__ import annotations

import _thread
import os
import sys

from devguard._version import __version__

TYPE_CHECKING = False  # Not typing's, because importing typing takes longer than the rest of this module.
if TYPE_CHECKING:
    from devguard.activation.install import install, uninstall
    from devguard.activation.status import contexts, owner, status, strays
    from devguard.errors import (
        ConfigError,
        DevGuardError,
        DeviceResolutionError,
        SimulationError,
        StrayDeviceError,
        StrayDeviceWarning,
    )
    from devguard.guards.guard import guard
    from devguard.guards.no_strays import no_strays
    from devguard.guards.remap import remap
    from devguard.guards.unguarded import unguarded
    from devguard.reporting.allowlist import allow
    from devguard.reporting.announcements import on_stray
    from devguard.reporting.stray import Stray
    from devguard.support.callsite import Site

__all__ = [
    "__version__",
    "allow",
    "ConfigError",
    "contexts",
    "DevGuardError",
    "DeviceResolutionError",
    "guard",
    "install",
    "no_strays",
    "on_stray",
    "owner",
    "remap",
    "SimulationError",
    "Site",
    "status",
    "Stray",
    "StrayDeviceError",
    "StrayDeviceWarning",
    "strays",
    "unguarded",
    "uninstall",
]

# Public name -> the module that defines it, which is imported when the name is first used (PEP 562).
_HOMES = {
    **dict.fromkeys(("install", "uninstall"), "activation.install"),
    **dict.fromkeys(("contexts", "owner", "status", "strays"), "activation.status"),
    **{name: f"guards.{name}" for name in ("guard", "no_strays", "remap", "unguarded")},
    **dict.fromkeys(
        (
            "ConfigError",
            "DevGuardError",
            "DeviceResolutionError",
            "SimulationError",
            "StrayDeviceError",
            "StrayDeviceWarning",
        ),
        "errors",
    ),
    "allow": "reporting.allowlist",
    "on_stray": "reporting.announcements",
    "Site": "support.callsite",
    "Stray": "reporting.stray",
}


# A fork waits for imports of other threads: its child could never import a module that another thread was importing.
# The lock lies here, because other modules are imported under it; see support/forks.py for all other locks.
_importing = _thread.RLock()  # threading itself would take longer to import than this module


def _at_fork(hook: str) -> None:
    """Run a hook of support/forks.py, which may have been imported after the fork looked for hooks."""
    function = getattr(sys.modules.get("devguard.support.forks"), hook, None)
    if function is not None:
        function()


def _before_fork() -> None:
    _importing.acquire()
    _at_fork("before")


def _after_fork(hook: str) -> None:
    _at_fork(hook)
    _importing.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork("after"),
    after_in_child=lambda: _after_fork("after_in_child"),
)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None and name != "integrations":
        raise AttributeError(f"module 'devguard' has no attribute {name!r}")
    with _importing:
        import importlib

        module = importlib.import_module(f"devguard.{home or 'integrations'}")
    if home is None:
        return module
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Then torch does not load devguard, which would report a guard that is off.
if os.environ.get("DEVGUARD") and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
    from devguard.ownership import unloaded as _unloaded

    _unloaded.watch()
