"""What ``import torch`` costs more where devguard is installed: unset, and with ``DEVGUARD=repair``.

torch loads an entry point and calls it, at the end of its import. That is timed, as this thread's processor time, in a
process that has imported torch without it; after each time everything is taken back, what was imported is forgotten.
A process that never imports torch never loads the entry point, and pays nothing.
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
    assert not sys.modules["devguard.autoload"].problem
    assert ("devguard.activation" in sys.modules) == bool(mode)
    if mode:
        assert sys.modules["devguard.activation"].uninstall() == []
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gc.collect()
    return taken / 1e6

rounds, modes = int(sys.argv[1]), sys.argv[2:]
for mode in modes: once(mode)
print(json.dumps([[once(mode) for mode in modes] for _ in range(rounds)]))
"""


def starting() -> list[Row]:
    """The entry point, loaded and called, in milliseconds."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD_LOG")}
    modes = [mode for mode, _ in SETTINGS.values()]
    command = [sys.executable, "-c", _PROGRAM, str(ROUNDS), *modes]
    with tempfile.TemporaryDirectory() as bytecode:  # an installed package has it
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
