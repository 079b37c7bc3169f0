"""A library that is not careful with the current device."""

import torch


def setup():
    """Leave device 0 current."""
    torch.cuda.set_device(0)  # STRAY


def careful():
    """Visit a device and come back."""
    previous = torch.cuda.current_device()
    torch.cuda.set_device(previous)
