"""A stand-in for Triton, for the door ``triton``: Triton is 700 MB (tests/real_triton.py uses the real one)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]

# The calls, and the uses of the current device, follow triton/runtime/jit.py and autotuner.py of Triton 3.7.
JIT = """
import torch

class KernelInterface:
    def warmup(self, *args, grid, **kwargs):
        return self.run(grid=grid, warmup=True, *args, **kwargs)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.run(grid=grid, warmup=False, *args, **kwargs)

class JITFunction(KernelInterface):
    def __init__(self, fn):
        self.fn = fn
        self.launched = []

    def run(self, *args, grid, warmup, **kwargs):
        self.launched.append(torch.cuda.current_device())
        return self.fn(*args, **kwargs)

class TensorWrapper:
    def __init__(self, base):
        self.base = base

    def data_ptr(self):
        return self.base.data_ptr()

class constexpr:
    def __init__(self, value):
        self.value = value

class Heuristics(KernelInterface):
    def __init__(self, fn):
        self.fn = fn

    def run(self, *args, **kwargs):
        return self.fn.run(*args, **kwargs)
"""
AUTOTUNER = """
import torch
from triton.runtime.jit import KernelInterface

class Autotuner(KernelInterface):
    def __init__(self, fn):
        self.fn = fn
        self.timed_on = []

    def run(self, *args, **kwargs):
        self.timed_on.append(torch.empty(1, device="cuda").get_device())
        for _ in range(2):
            self.fn.run(*args, **kwargs)
        return self.fn.run(*args, **kwargs)
"""


def write(folder: Path) -> Path:
    """Write a package ``triton`` under ``site-packages`` in `folder`; return the folder to put on ``sys.path``."""
    runtime = folder / "site-packages" / "triton" / "runtime"
    runtime.mkdir(parents=True)
    (runtime.parent / "__init__.py").write_text("")
    (runtime / "__init__.py").write_text("")
    (runtime / "jit.py").write_text(JIT)
    (runtime / "autotuner.py").write_text(AUTOTUNER)
    return runtime.parents[1]
