"""What a test's ``@pytest.mark.devguard(...)`` says: the nearest marker that gives an argument decides it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from devguard import modes
from devguard.errors import ConfigError
from devguard.modes import Mode
from devguard.ownership.owner import Owner, parse_owner
from devguard.testing.declared import marker

__all__ = ["Marked", "of"]


class Marked(NamedTuple):
    """What the markers of one test ask for.

    Attributes
    ----------
    device : Owner or None
        Its own owner.
    mode : str or None
        Its own mode.
    allow : tuple
        Devices that it may use besides.
    """

    device: Owner | None
    mode: Mode | None
    allow: tuple[Any, ...]


def of(item: pytest.Item) -> Marked:
    """Read the markers of a test.

    Raises
    ------
    ConfigError
        For arguments that the marker does not have, or a mode that does not exist.
    DeviceResolutionError
        For something that is not a device.
    """
    device: Owner | None = None
    mode: Mode | None = None
    allow: tuple[Any, ...] = ()
    for mark in item.iter_markers("devguard"):
        try:
            said = marker(*mark.args, **mark.kwargs)
        except TypeError as error:
            raise ConfigError(
                f"@pytest.mark.devguard: {error}. Its arguments: device='cuda:1', mode='observe', allow=['cuda:2']."
            ) from None
        if device is None and said["device"] is not None:
            device = parse_owner(said["device"], "the device of the devguard marker")
        if mode is None and said["mode"] is not None:
            mode = modes.check_mode(said["mode"])
        given = said["allow"]
        allow = allow or (tuple(given) if isinstance(given, (list, tuple, set, frozenset)) else (given,))
    for one in allow:
        parse_owner(one, "allow= of the devguard marker")
    return Marked(device, mode, allow)
