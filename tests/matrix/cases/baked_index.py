"""BAKED-INDEX: an exported program holds ``cuda:0``."""

import os
import tempfile

import torch
import torch.export

PATH = os.path.join(tempfile.mkdtemp(), "program.pt2")


class _Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def forward(self, x):
        return torch.zeros(4, device=self.device) + x.to(self.device)


def before(mode):
    model = _Model("cuda:1" if mode == "behaves" else "cuda:0")
    torch.export.save(torch.export.export(model, (torch.ones(4),)), PATH)


def stray():
    program = torch.export.load(PATH)  # STRAY
    return program.module()(torch.ones(4))


behaves = stray


def REPAIRED(result):
    return result.device.index == 1
