"""INIT-ORDER: CUDA touched before the process chose its device."""

import torch

TOUCHED = []


def before():
    from tests.matrix.harness import sys

    if sys.argv[2] != "behaves":
        TOUCHED.append(torch.ones(1, device="cuda"))  # STRAY


def stray():
    return torch.empty(4, device="cuda")


behaves = stray
