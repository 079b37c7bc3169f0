"""CLOBBER: a library changes the current device and does not restore it."""

import sys
from pathlib import Path

import torch

# A separate folder, as of an installed library.
sys.path.insert(0, str(Path(__file__).parents[1] / "libraries"))
import some_library


def stray():
    some_library.setup()
    torch.cuda.synchronize()  # A door: it judges the change of device.
    return torch.empty(4, device="cuda")


def behaves():
    some_library.careful()
    return torch.empty(4, device="cuda")


OPENS = (0,)  # The library's set_device opens it, and no repair closes a context.


def REPAIRED(result):
    return result.device.index == 1
