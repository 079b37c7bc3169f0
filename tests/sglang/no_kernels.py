"""Tells SGLang and Triton that there is no CUDA, while torch sees the simulated GPUs.

A simulated GPU runs no kernels, so SGLang must take its CPU paths; but torch itself refuses to restore a tensor on a
GPU where ``torch.cuda.is_available()`` is False. So the answer depends on who asks. torch calls `hide` at the end of
its import, by the entry point in site/: in every process, the ones that SGLang starts included.
"""

from __future__ import annotations

import functools
import sys

__all__ = ["hide"]

TOLD_NO = ("sglang", "triton")


def hide() -> None:
    """Make ``torch.cuda.is_available()`` answer False to SGLang and to Triton."""
    import torch

    available = torch.cuda.is_available

    @functools.wraps(available)
    def is_available() -> bool:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        return asking.partition(".")[0] not in TOLD_NO and available()

    torch.cuda.is_available = is_available
