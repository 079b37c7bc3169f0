"""Which device the tests of this process own.

Each worker of pytest-xdist owns one GPU: worker ``gw5`` on four GPUs owns ``cuda:1``. Elsewhere it is what
``DEVGUARD_DEVICE`` or the launcher's local rank says, else the first GPU, else ``cpu``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from devguard import accelerator, in_force, owners
from devguard.owners import CPU, Owner

__all__ = ["device_of", "of_process"]


def of_process(environ: Mapping[str, str]) -> Owner:
    """Return the owner of a process with this environment; imports torch, to count its devices.

    Raises
    ------
    DeviceResolutionError, ConfigError
        If what names a device names none that this process sees.
    """
    accelerator.torch_module()
    count = accelerator.device_count()
    worker = re.fullmatch(r"gw(\d+)", environ.get("PYTEST_XDIST_WORKER", ""))
    if worker and count and not environ.get("DEVGUARD_DEVICE", "").strip():
        return owners.of_index(int(worker[1]) % count)
    named, _ = owners.from_environment(environ)
    if named is None:
        return owners.of_index(0) if count else CPU
    if named.index >= count:
        raise accelerator.out_of_range("the owner of these tests", named.index)
    return named


def device_of(marked: Owner | None, environ: Mapping[str, str]) -> Any:
    """Return the ``torch.device`` that a test owns; `marked` is the owner that its marker names."""
    torch = accelerator.torch_module()
    return torch.device((marked or in_force.owner() or of_process(environ)).tag)
