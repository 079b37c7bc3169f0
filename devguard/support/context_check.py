"""torch's own check of contexts (2.15): ``torch.cuda.set_device`` warns or raises if another device holds a context.

``TORCH_CUDA_CHECK_STRAY_CONTEXT`` sets it, and torch reads the variable once. Here it follows the mode of the process,
unless the user has set it. An older torch has no such check, and nothing is changed.
"""

from __future__ import annotations

import os
import sys

from devguard.support.installed_torch import import_torch

__all__ = ["follow", "restore", "VARIABLE"]

VARIABLE = "TORCH_CUDA_CHECK_STRAY_CONTEXT"

_was: list[str | None] = []  # what `follow` found first


def follow(mode: str) -> None:
    """Make the check follow `mode`, if that is ``warn`` or ``error``; children inherit the variable."""
    cached = getattr(import_torch().cuda, "_get_stray_context_mode", None)
    if cached is None or mode not in ("warn", "error") or (os.environ.get(VARIABLE) and not _was):
        return
    if not _was:
        _was.append(os.environ.get(VARIABLE))
    os.environ[VARIABLE] = mode
    cached.cache_clear()


def restore() -> None:
    """Restore the variable."""
    if not _was:
        return
    was = _was.pop()
    if was is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = was
    sys.modules["torch"].cuda._get_stray_context_mode.cache_clear()
