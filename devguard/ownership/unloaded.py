"""``DEVGUARD`` is set, and torch does not load devguard: then only the guards in the code of the program work.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` does that, a torch that is too old, or a devguard that is not installed. A program
that imports devguard is told so. Importing this module imports neither torch nor wrapt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from devguard.modes import is_killed
from devguard.ownership.process import process
from devguard.support.strictness import report_off

__all__ = ["is_prevented", "report", "watch"]


def report() -> None:
    """Report that ``DEVGUARD`` is set and torch has not loaded devguard, for torch that is imported or about to be."""
    mode = os.environ.get("DEVGUARD", "").strip()
    if not mode or is_killed() or "devguard.autoload" in sys.modules or process.source:
        return
    if is_prevented():
        why = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it"
    elif "torch" in sys.modules:
        why = (
            "torch has not loaded devguard, which is not installed in this environment, or torch is too old. Install it"
        )
    else:
        return
    problem = f"{why}, or unset DEVGUARD."
    process.fail(problem)
    report_off(
        f"devguard is off in this process, except for the guards in its code, although DEVGUARD={mode!r}: {problem}"
    )


def is_prevented(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether the environment keeps torch from loading devguard."""
    return (os.environ if environ is None else environ).get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"


def watch() -> None:
    """Report it when torch is imported, or now if it is; the commands of devguard do not import torch."""
    if "torch" in sys.modules:
        report()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """A finder that finds nothing, and reports the first import of torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            report()
