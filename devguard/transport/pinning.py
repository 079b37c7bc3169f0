"""Pinned host memory, which a GPU reads and writes without a copy in between.

Only in processes that use CUDA already: registering memory needs a context, and a process that owns no GPU must not
open one. Where memory cannot be pinned, copies take the slower way, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from devguard.support import forks
from devguard.support.notices import Failures
from devguard.transport.memory import Mapping

__all__ = ["failures", "pin"]

failures = Failures()
_lock = forks.new_lock()

_PORTABLE, _READ_ONLY = 0x1, 0x8  # cudaHostRegister's flags


def pin(mapping: Mapping, device: Any, *, read_only: bool = False) -> bool:
    """Pin a map until it is unmapped, if this process uses CUDA; return whether it is pinned.

    The first call for a map takes time: milliseconds for 64 MiB.

    Parameters
    ----------
    mapping : Mapping
        The map.
    device : device
        The GPU that copies first; all others can use the map, too. Nothing is pinned for other kinds of devices.
    read_only : bool
        Whether the map may only be read.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or torch.device(device).type != "cuda":
        return False
    with _lock:
        return _pin(torch, mapping, device, read_only)


def _pin(torch: Any, mapping: Mapping, device: Any, read_only: bool) -> bool:
    if mapping.before_unmap is not None:
        return mapping.before_unmap is not _nothing
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    cudart = torch.cuda.cudart()
    flags = _PORTABLE | (_READ_ONLY if read_only else 0)
    with torch.cuda.device(index):
        error = cudart.cudaHostRegister(mapping.address, mapping.nbytes, flags)
        if int(error) != 0:
            failures.record(RuntimeError(f"cudaHostRegister of {mapping.nbytes:,} bytes: {error}"))
            with contextlib.suppress(RuntimeError):  # torch would raise the runtime's last error at the next kernel
                torch.zeros(1, device=f"cuda:{index}")
            mapping.before_unmap = _nothing  # not again
            return False
    address = mapping.address

    def unpin() -> None:
        # On any thread, also one that has chosen no GPU: without a device the call would open a context on GPU 0.
        with contextlib.suppress(Exception), torch.cuda.device(index):  # at the end of the process CUDA has gone
            cudart.cudaHostUnregister(address)

    mapping.before_unmap = unpin
    return True


def _nothing() -> None:
    """Nothing is to be undone."""
