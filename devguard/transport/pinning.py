"""Pinned host memory, which a GPU reads and writes without a copy in between.

Only in processes that use CUDA already: registering memory needs a context, and a process that owns no GPU must not
open one. Where memory cannot be pinned, copies take the slower way, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import sys

from devguard.support.notices import Failures
from devguard.transport.memory import Mapping

__all__ = ["failures", "pin"]

failures = Failures()

_PORTABLE, _READ_ONLY = 0x1, 0x8  # cudaHostRegister's flags


def pin(mapping: Mapping, *, read_only: bool = False) -> bool:
    """Pin a map until it is unmapped, if this process uses CUDA; return whether it is pinned.

    The first call for a map takes time: milliseconds for 64 MiB.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    if mapping.before_unmap is not None:
        return True
    cudart = torch.cuda.cudart()
    flags = _PORTABLE | (_READ_ONLY if read_only else 0)
    error = cudart.cudaHostRegister(mapping.address, mapping.nbytes, flags)
    if int(error) != 0:
        failures.record(RuntimeError(f"cudaHostRegister of {mapping.nbytes:,} bytes: {error}"))
        with contextlib.suppress(RuntimeError):  # torch would raise the runtime's last error at the next kernel
            torch.zeros(1, device="cuda")
        mapping.before_unmap = _nothing  # not again
        return False
    address = mapping.address
    mapping.before_unmap = lambda: cudart.cudaHostUnregister(address)
    return True


def _nothing() -> None:
    """Nothing is to be undone."""
