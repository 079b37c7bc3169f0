"""TRITON-CUR: Triton launches on the current device, not on that of its arguments (with a stand-in for Triton)."""

import sys
import tempfile
from pathlib import Path

import torch

from tests.helpers import triton_stand_in

KERNELS = []


def _kernel(x):
    """Allocate scratch memory on the current device, as the launcher of a kernel does."""
    return torch.empty(1, device="cuda").get_device()


def before(mode):
    sys.path.insert(0, str(triton_stand_in.write(Path(tempfile.mkdtemp()))))
    from triton.runtime.jit import JITFunction

    KERNELS.append(JITFunction(_kernel))


def stray():
    x = torch.empty(4, device="cuda:1")
    torch._C._cuda_maybeExchangeDevice(0)  # As a library that leaves another device current.
    return KERNELS[0][(1,)](x)  # STRAY


def behaves():
    return KERNELS[0][(1,)](torch.empty(4, device="cuda"))


def REPAIRED(result):
    return result == 1
