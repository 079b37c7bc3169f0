"""Run a short program in a fresh Python process on the simulated GPUs of the test: `run_child`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.helpers.simulated import ROOT

__all__ = ["PRELUDE", "run_child"]

PRELUDE = """
import pickle, sys, torch, devguard
data = sys.stdin.buffer.read()
def ctx(): return [device.index for device in devguard.contexts()]
"""


def run_child(
    code: str,
    data: bytes = b"",
    *,
    prelude: str = PRELUDE,
    arguments: Sequence[str] = (),
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `code` and return its output without white space around it; fail the test if the program fails.

    Parameters
    ----------
    code : str
        The program. After `PRELUDE` it can use pickle, sys, torch, devguard, ``data`` and ``ctx()``, which returns the
        indices of the devices that hold a context.
    data : bytes
        The standard input.
    prelude : str
        Code that runs first.
    arguments, options : sequence of str
        The rest of ``sys.argv``, and options of Python such as ``-W error``.
    environment : mapping of str to str, optional
        Variables to set for the program.
    """
    done = subprocess.run(
        [sys.executable, *options, "-c", prelude + code, *arguments],
        input=data,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()
