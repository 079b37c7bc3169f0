"""INIT-ORDER: CUDA touched before the process chose its device."""

import torch

import devguard

TOUCHED = []


def before(mode):
    with devguard.guard("cpu"):  # opens the doors; activation by environment will do so on `import torch`
        pass
    if mode != "behaves":
        TOUCHED.append(torch.ones(1, device="cuda"))  # STRAY


def stray():
    return torch.empty(4, device="cuda")


behaves = stray
