"""The exceptions and the warning that devguard raises.

Every class keeps its constructor arguments in ``args``, so that an instance survives pickling from a worker process
to its parent. This module does not import torch.
"""

from __future__ import annotations

import queue

__all__ = [
    "BudgetFull",
    "ConfigError",
    "DevGuardError",
    "DeviceResolutionError",
    "HandleReleased",
    "PeerGone",
    "SimulationError",
    "StrayDeviceError",
    "StrayDeviceWarning",
    "TracingError",
]


class DevGuardError(RuntimeError):
    """Base class of every error that devguard raises."""


class StrayDeviceError(DevGuardError):
    """In mode ``error``, work landed or was about to land on a device that is not the owner's."""


class DeviceResolutionError(DevGuardError, ValueError):
    """The owner is unknown: nothing names it, or the name is not a device that this process sees."""


class ConfigError(DevGuardError, ValueError):
    """A mode, a door, an argument or an environment variable has an invalid value."""


class SimulationError(DevGuardError):
    """Simulated GPUs are not available here; the message names what is missing and how to get it."""


class TracingError(DevGuardError):
    """Contexts cannot be traced here; the message names what is missing and how to get it."""


class BudgetFull(DevGuardError, queue.Full):
    """An arena has no room for a payload: now, within the time-out, or ever."""


class HandleReleased(DevGuardError, ValueError):
    """A handle cannot be read: its lease has ended, or this reader has read it before."""


class PeerGone(DevGuardError, ConnectionError):
    """The process at the other end of a transport is dead, cannot be reached, or is not one to talk to."""


class StrayDeviceWarning(RuntimeWarning):
    """In mode ``warn``, work landed on a device that is not the owner's; issued once per call site."""
