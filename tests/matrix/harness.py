"""Runs one case in one mode, in this process: ``python -m tests.matrix.harness CASE MODE``; prints JSON.

A case is a small user program in cases/: ``stray()`` does what the class describes, on the line marked ``# STRAY``;
``behaves()`` does the same work as it should be done. Optional: ``before()`` runs outside the guard, first;
``REPAIRED`` is a function of stray()'s result that tells whether the work ended up on the owner, cuda:1; ``STRAYS`` is
one that returns what a child process recorded; ``OPENS`` are devices whose context is open before any repair.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any

OWNER = "cuda:1"
MODES = ("unguarded", "observe", "repair", "error", "behaves")


def main(case: str, mode: str) -> int:
    warnings.simplefilter("ignore")
    import torch

    import devguard

    module = importlib.import_module(f"tests.matrix.cases.{case}")
    report: dict[str, Any] = {"error": None, "result": None}
    getattr(module, "before", lambda: None)()
    work = module.behaves if mode == "behaves" else module.stray
    try:
        if mode == "unguarded":
            torch.cuda.set_device(OWNER)
            result = work()
        else:
            with devguard.guard(OWNER, mode="error" if mode == "behaves" else mode):
                result = work()
        report["result"] = bool(module.REPAIRED(result)) if hasattr(module, "REPAIRED") else None
    except Exception as error:  # noqa: BLE001 - whatever a case raises is what it shows
        report["error"] = f"{type(error).__name__}: {error}"
    report["strays"] = [] if mode == "unguarded" else [row(stray) for stray in devguard.strays()]
    if mode != "unguarded" and report["error"] is None and hasattr(module, "STRAYS"):
        report["strays"] += module.STRAYS(result)
    report["contexts"] = [device.index for device in devguard.contexts()]
    report["pid"] = os.getpid()
    report["opens"] = getattr(module, "OPENS", ())
    print(json.dumps(report), flush=True)
    return 0


def row(stray: Any) -> dict[str, Any]:
    site = stray.site
    return {
        "door": stray.door,
        "action": stray.action,
        "source": stray.source,
        "file": site and os.path.basename(site.file),
        "line": site and site.line,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
