"""A library that does not restore the current device."""

import torch


def setup():
    """Leave device 0 current."""
    torch.cuda.set_device(0)  # STRAY


def careful():
    """Set the device that is already current."""
    previous = torch.cuda.current_device()
    torch.cuda.set_device(previous)
