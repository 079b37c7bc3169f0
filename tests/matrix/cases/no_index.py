"""NO-INDEX: a bare "cuda" means GPU 0 in safetensors, whatever the current device is."""

import os
import tempfile

import torch
from safetensors.torch import load_file, save_file

PATH = os.path.join(tempfile.mkdtemp(), "x.safetensors")


def before(mode):
    save_file({"x": torch.arange(8.0)}, PATH)


def stray():
    return load_file(PATH, device="cuda")  # STRAY


def behaves():
    return load_file(PATH, device="cuda:1")


def REPAIRED(result):
    return result["x"].device.index == 1
