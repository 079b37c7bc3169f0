"""STREAM-EVENT (device named): a stream on another device that the program named; it stays there."""

import torch


def stray():
    return torch.cuda.Stream(device=0)  # STRAY


def behaves():
    return torch.cuda.Stream(), torch.cuda.Event()
