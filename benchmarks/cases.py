"""The comparisons: groups of rows, one function a group."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import devguard
from benchmarks.measure import ROUNDS, Row, Run, compare, row
from benchmarks.states import OWNER, STATES, guarded, plain

SIZES = {"16 B": 16, "1 MB": 1 << 20, "256 MB": 256 << 20}


def entering() -> list[Row]:
    """Compare ``with guard(i)`` with ``with torch.cuda.device(i)``; guards must be cheap enough to use anywhere."""

    def base(index: int) -> Run:
        def run(times: int) -> None:
            device = torch.cuda.device
            for _ in range(times):
                with device(index):
                    pass

        return run

    def ours(index: int) -> Run:
        def run(times: int) -> None:
            guard = devguard.guard
            for _ in range(times):
                with guard(index):
                    pass

        return run

    def hoisted(scope: Any) -> Run:
        def run(times: int) -> None:
            for _ in range(times):
                with scope:
                    pass

        return run

    torch.cuda.set_device(OWNER)
    torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1")
    rows = []
    for index, state, budget in ((OWNER, "already current", 1.0), (1 - OWNER, "changes", 1.2)):
        rows.append(compare(f"with guard(i), device {state}", base(index), ours(index), budget))
        both = hoisted(torch.cuda.device(index)), hoisted(devguard.guard(index))
        rows.append(compare(f"the same, both objects hoisted, device {state}", *both, budget))
    return rows


def _pickled(nbytes: int, device: str) -> bytes:
    return pickle.dumps(torch.zeros(nbytes, dtype=torch.uint8).to(device))


def _saved(nbytes: int, device: str) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(torch.zeros(nbytes, dtype=torch.uint8).to(device), file)
    return file


def _load(file: io.BytesIO, **options: Any) -> Callable[[], Any]:
    def load() -> Any:
        file.seek(0)
        return torch.load(file, **options)

    return load


def harmless() -> list[Row]:
    """Compare guarded with unguarded calls that need no repair."""
    rows = []
    value = {"text": "x" * 100, "numbers": list(range(100)), "nested": [{"a": (1, 2.0, None)}] * 10}
    data = pickle.dumps(value)
    call = lambda: pickle.loads(data)  # noqa: E731
    rows.append(compare("pickle.loads without tensors, against itself", plain(call), plain(call), None))
    rows.append(compare("pickle.loads without tensors", plain(call), guarded(call), 1.0, **STATES))
    for name in ("16 B", "1 MB"):
        own = _pickled(SIZES[name], f"cuda:{OWNER}")
        call = lambda own=own: pickle.loads(own)  # noqa: E731
        what = f"pickle.loads of {name} tagged with the owner"
        rows.append(compare(what, plain(call), guarded(call), 1.02, **STATES))
        load = _load(_saved(SIZES[name], f"cuda:{OWNER}"))
        what = f"torch.load of {name} tagged with the owner"
        rows.append(compare(what, plain(load), guarded(load), 1.02, **STATES))
    host, small = torch.zeros(1000), torch.zeros(4, device=f"cuda:{OWNER}")
    for what, call in {
        "torch operator on the host (add, 1000 numbers)": lambda: host + 1,
        "torch operator on the owner (add, 4 numbers)": lambda: small + 1,
        "pickle.dumps of a tensor on the owner": lambda: pickle.dumps(small),
    }.items():
        rows.append(compare(what, plain(call), guarded(call), 1.0, **STATES))
    return rows


def repaired() -> list[Row]:
    """Compare a repaired load with a load of the same bytes onto the right device."""
    rows = []
    for name, nbytes in SIZES.items():
        stray, own = _pickled(nbytes, f"cuda:{1 - OWNER}"), _pickled(nbytes, f"cuda:{OWNER}")
        base = plain(lambda own=own: pickle.loads(own))
        ours = guarded(lambda stray=stray: pickle.loads(stray))
        what = f"pickle.loads of {name}, repaired / tagged with the owner"
        rows.append(compare(what, base, ours, 1.05, **STATES))
        del stray, own, base, ours
        file = _saved(nbytes, f"cuda:{1 - OWNER}")
        base, ours = plain(_load(file, map_location=f"cuda:{OWNER}")), guarded(_load(file))
        what = f"torch.load of {name}, repaired / right map_location"
        rows.append(compare(what, base, ours, 1.05, **STATES))
        torch.cuda.empty_cache()
    return rows


def coroutines() -> list[Row]:
    """Measure the additional cost of a suspend and resume of a decorated coroutine, in microseconds."""

    async def work(times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(0)

    def seconds(function: Any, times: int) -> float:
        async def main() -> float:
            start = time.thread_time()
            await function(times)
            return time.thread_time() - start

        return asyncio.run(main())

    times = 20_000
    decorated = devguard.guard(OWNER)(work)
    seconds(decorated, 100)
    torch.cuda.set_device(0)  # So that each step really changes the device.
    costs = [(seconds(decorated, times) - seconds(work, times)) / times * 1e6 for _ in range(ROUNDS)]
    return [row("suspend + resume of a decorated coroutine", costs, 3.0, "us")]


def importing() -> list[Row]:
    """Measure ``import devguard`` and the command line's help, in milliseconds on top of Python's start."""
    rows = []
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # An installed package has its bytecode.
    for what, code, budget in (
        ("import devguard", "import devguard", 15.0),
        ("devguard --help, imports (most of it argparse)", "import devguard.cli", None),
    ):
        figures = []
        for _ in range(ROUNDS):
            command = [sys.executable, "-X", "importtime", "-c", code]
            text = subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stderr
            rows_of = re.findall(r"\|\s+(\d+) \| (\s*)devguard", text)
            figures.append(max(int(total) for total, _ in rows_of) / 1000)
        rows.append(row(what, figures, budget, "ms"))
    return rows


GROUPS: dict[str, Callable[[], list[Row]]] = {
    "entering": entering,
    "harmless": harmless,
    "repaired": repaired,
    "coroutines": coroutines,
    "importing": importing,
}
