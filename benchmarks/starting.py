"""The additional cost of ``import torch`` with devguard installed: ``DEVGUARD`` unset, and ``DEVGUARD=repair``.

torch loads an entry point at the end of its import and calls it. The program times both, as the thread's processor
time, in a process that has imported torch without the entry point. After each round it uninstalls devguard and drops
the imported modules. A process that never imports torch never loads the entry point and has no additional cost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from benchmarks.measure import ROUNDS, Row, row

SETTINGS = {"unset": ("", 1.0), "repair": ("repair", 60.0)}

_PROGRAM = """
import gc, json, os, sys, time
import torch
import torch.multiprocessing
from importlib.metadata import entry_points
(hook,) = [found for found in entry_points(group="torch.backends") if found.name == "devguard"]
before = set(sys.modules)
assert not [name for name in before if name.partition(".")[0] == "devguard"]

def once(mode):
    os.environ["DEVGUARD"] = mode
    start = time.thread_time_ns()
    hook.load()()
    taken = time.thread_time_ns() - start
    assert ("devguard.activation.install" in sys.modules) == bool(mode)
    if mode:
        assert sys.modules["devguard.ownership.process"].process.problem is None
        assert sys.modules["devguard.activation.install"].uninstall() == []
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gc.collect()
    return taken / 1e6

rounds, modes = int(sys.argv[1]), sys.argv[2:]
for mode in modes: once(mode)
print(json.dumps([[once(mode) for mode in modes] for _ in range(rounds)]))
"""


def starting() -> list[Row]:
    """Measure loading and calling the entry point, in milliseconds."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD_LOG")}
    modes = [mode for mode, _ in SETTINGS.values()]
    command = [sys.executable, "-c", _PROGRAM, str(ROUNDS), *modes]
    with tempfile.TemporaryDirectory() as bytecode:  # An installed package has its bytecode.
        environ |= {
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": bytecode,
        }
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    figures = list(zip(*json.loads(done.stdout), strict=True))
    return [
        row(f"import torch, DEVGUARD {name}: what it takes longer", taken, budget, "ms")
        for (name, (_, budget)), taken in zip(SETTINGS.items(), figures, strict=True)
    ]
