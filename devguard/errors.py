"""The exceptions and the warning that devguard raises.

Every class keeps its constructor arguments in ``args``, so that an instance survives pickling on its way from a
worker process to its parent. Nothing here imports torch.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DevGuardError",
    "DeviceResolutionError",
    "SimulationError",
    "StrayDeviceError",
    "StrayDeviceWarning",
    "TracingError",
]


class DevGuardError(RuntimeError):
    """Base class of every error that devguard raises on its own behalf."""


class StrayDeviceError(DevGuardError):
    """Work landed, or was about to land, on a device that is not the owner's, and the mode is ``error``."""


class DeviceResolutionError(DevGuardError, ValueError):
    """The owner could not be told: nothing names it, or what names it is not a device that this process sees."""


class ConfigError(DevGuardError, ValueError):
    """A mode, a door, an argument or an environment variable has a value that means nothing."""


class SimulationError(DevGuardError):
    """Simulated GPUs cannot be had here; the message says what is missing and how to get it."""


class TracingError(DevGuardError):
    """Contexts cannot be traced here; the message says what is missing and how to get it."""


class StrayDeviceWarning(RuntimeWarning):
    """Work landed on a device that is not the owner's, and the mode is ``warn``; given once per call site."""
