"""CLOBBER: a library changes the current device and does not put it back."""

import sys
from pathlib import Path

import torch

# a package of its own, as an installed library is
sys.path.insert(0, str(Path(__file__).parents[1] / "libraries"))
import some_library


def stray():
    some_library.setup()
    torch.cuda.synchronize()  # a door: here the change is settled
    return torch.empty(4, device="cuda")


def behaves():
    some_library.careful()
    return torch.empty(4, device="cuda")


OPENS = (0,)  # by the library's set_device itself: no repair gives a context back


def REPAIRED(result):
    return result.device.index == 1
