"""STREAM-EVENT: a stream made for another device than the owner's."""

import torch


def stray():
    return torch.cuda.Stream(device=0)  # STRAY


def behaves():
    return torch.cuda.Stream(), torch.cuda.Event()
