"""Hide CUDA from SGLang and Triton, while torch sees the simulated GPUs.

A simulated GPU runs no kernels, so SGLang must take its CPU paths; but torch itself refuses to restore a tensor on a
GPU if ``torch.cuda.is_available()`` is False. The result therefore depends on the caller. torch calls `hide` at the
end of its import, through the entry point in site/, in every process, including those that SGLang starts.
"""

from __future__ import annotations

import functools
import sys

__all__ = ["hide"]

WITHOUT_CUDA = ("sglang", "triton")


def hide() -> None:
    """Make ``torch.cuda.is_available()`` return False to SGLang and Triton."""
    import torch

    available = torch.cuda.is_available

    @functools.wraps(available)
    def is_available() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.partition(".")[0] not in WITHOUT_CUDA and available()

    torch.cuda.is_available = is_available
