"""STREAM-EVENT (device named): a stream that the program makes on another device than the owner's; it stays there."""

import torch


def stray():
    return torch.cuda.Stream(device=0)  # STRAY


def behaves():
    return torch.cuda.Stream(), torch.cuda.Event()
