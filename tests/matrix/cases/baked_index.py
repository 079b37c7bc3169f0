"""BAKED-INDEX: an exported program holds ``cuda:0``."""

import os
import tempfile

import torch

PATH = os.path.join(tempfile.mkdtemp(), "program.pt2")


class _Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def forward(self, x):
        return x + torch.zeros(4, device=self.device).to(x.device)


def _load(device):
    torch.export.save(torch.export.export(_Model(device), (torch.ones(4),)), PATH)
    return torch.export.load(PATH)  # STRAY


def stray():
    return _load("cuda:0")


def behaves():
    return _load("cpu")
