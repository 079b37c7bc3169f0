"""The folder that ``DEVGUARD_LOG`` names. A relative path counts from the folder in which the program started.

The first look makes the variable absolute, so that the program may change its working directory afterwards, and child
processes write to the same folder. Before that, the working directory may have changed already; Python then knows where
the program started by the relative path of its script, or by ``python -m``. With a script that has an absolute path, or
``python -c``, nothing shows it, and the path counts from the working directory of the first look: that of
``import torch``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = ["locate", "TEMPORARY", "VARIABLE"]

VARIABLE = "DEVGUARD_LOG"
TEMPORARY = ".devguard-summary-"  # how the name of a folder begins that is removed when the program has ended


def locate() -> Path | None:
    """Return the folder, and make the variable absolute; None if the variable is not set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not os.path.isabs(text):
        with contextlib.suppress(OSError):  # the working directory was removed
            text = os.environ[VARIABLE] = os.path.abspath(os.path.join(_find_start() or os.getcwd(), text))
    return Path(os.path.normpath(text))


def _find_start() -> str | None:
    """Return the folder in which this program started; None if nothing shows it."""
    for name in ("__main__", "__mp_main__"):  # a spawned child runs the script of its parent under the second name
        module = sys.modules.get(name)
        if getattr(module, "__spec__", None) is not None:
            return _find_start_of_module()
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and os.path.isabs(path):
            return _find_start_of_script(path)
    return None


def _find_start_of_script(path: str) -> str | None:
    """Return the folder from which a word of the command line leads to the script; Python keeps both paths."""
    for word in (*sys.orig_argv[1:], *sys.argv[:1]):
        for whole, part in ((path, word), (os.path.normpath(path), os.path.normpath(word))):
            if whole == part:
                return None  # the command line names the script by its absolute path
            if whole.endswith(os.sep + part):
                return whole.removesuffix(part)
    return None


def _find_start_of_module() -> str | None:
    """Return the folder that ``python -m`` has put in front of ``sys.path``."""
    first = sys.path[0] if sys.path else ""
    if getattr(sys.flags, "safe_path", False) or os.getcwd() in sys.path or not os.path.isabs(first):
        return None
    return first if os.path.isdir(first) else None
