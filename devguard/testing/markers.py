"""Reads ``@pytest.mark.devguard(...)``: the nearest marker with an argument decides that argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from devguard import modes
from devguard.errors import ConfigError
from devguard.modes import Mode
from devguard.ownership.owner import Owner, parse_owner
from devguard.testing.declared import marker

__all__ = ["Marked", "read"]


class Marked(NamedTuple):
    """The combined markers of one test.

    Attributes
    ----------
    device : Owner or None
        The test's own owner.
    mode : str or None
        The test's own mode.
    allow : tuple
        Further devices that the test may use.
    """

    device: Owner | None
    mode: Mode | None
    allow: tuple[Any, ...]


def read(item: pytest.Item) -> Marked:
    """Read the markers of a test.

    Raises
    ------
    ConfigError
        If the marker does not have such an argument, or the mode does not exist.
    DeviceResolutionError
        If a value is not a device.
    """
    device: Owner | None = None
    mode: Mode | None = None
    allow: tuple[Any, ...] = ()
    for mark in item.iter_markers("devguard"):
        try:
            arguments = marker(*mark.args, **mark.kwargs)
        except TypeError as error:
            raise ConfigError(
                f"@pytest.mark.devguard: {error}. Valid arguments: device='cuda:1', mode='observe', allow=['cuda:2']."
            ) from None
        if device is None and arguments["device"] is not None:
            device = parse_owner(arguments["device"], "the device of the devguard marker")
        if mode is None and arguments["mode"] is not None:
            mode = modes.check_mode(arguments["mode"])
        allowed = arguments["allow"]
        allow = allow or (tuple(allowed) if isinstance(allowed, (list, tuple, set, frozenset)) else (allowed,))
    for entry in allow:
        parse_owner(entry, "allow= of the devguard marker")
    return Marked(device, mode, allow)
