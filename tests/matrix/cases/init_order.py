"""INIT-ORDER: CUDA is initialised before the process selects its device."""

import torch

import devguard

TOUCHED = []


def before(mode):
    with devguard.guard("cpu"):  # Opens the doors, as activation by environment does on `import torch`.
        pass
    if mode != "behaves":
        TOUCHED.append(torch.ones(1, device="cuda"))  # STRAY


def stray():
    return torch.empty(4, device="cuda")


behaves = stray
