"""VISIBILITY: CUDA_VISIBLE_DEVICES is changed after CUDA has read it."""

import os

import torch

import devguard


def stray():
    torch.empty(1, device="cuda")
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    with devguard.guard(0):  # STRAY
        return torch.cuda.device_count()


def behaves():
    with devguard.guard(1):
        return torch.cuda.device_count()
