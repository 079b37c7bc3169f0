"""What it costs to be watched, and to watch: 64 processes on 8 GPUs.

A watched process spends processor time on one look a second (`sampler.Sampler.look`), with a sample each time because
its memory has changed. The watcher reads 64 logs and a simulation's state, joins them and draws, once a second; the
processes are idle ones, in the names of which logs and state are written.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROUNDS, Row, row
from devguard.reporting import log_file, sampler
from devguard.reporting.journal import journal
from devguard.simgpu import records
from devguard.support import process_identity
from devguard.watch.screen.live import Screen, to_text
from devguard.watch.view import View

PROCESSES, GPUS = 64, 8
LOOKS = 50  # of a process, in each round
GIB = 1 << 30


def _being_watched() -> list[Row]:
    """Measure a second of a process with contexts on two GPUs, in microseconds."""
    tensors = [torch.ones(1 << 20, dtype=torch.uint8, device=f"cuda:{index}") for index in (0, 1)]
    rows = []
    for what in ("not watched", "watched, its memory changes"):
        with tempfile.TemporaryDirectory() as place:
            if what != "not watched":
                (Path(place) / sampler.RECORDED).touch()
            log_file.start(Path(place), last_look=lambda when: None)
            log: Any = journal.log
            figures = []
            for _ in range(ROUNDS):
                spent = 0
                for step in range(LOOKS):
                    tensors[0] = torch.ones(1 + step << 16, dtype=torch.uint8, device="cuda:0")
                    log._looked = 0.0  # as after a second
                    start = time.thread_time_ns()
                    log._sampler.look()
                    spent += time.thread_time_ns() - start
                figures.append(spent / LOOKS / 1000)
            log.stop()
        rows.append(row(f"a second of a process: {what}", figures, 100.0, "us"))
    return rows


@contextlib.contextmanager
def crowd(folder: Path) -> Iterator[Callable[[int], None]]:
    """Start idle processes, and write logs and a state in their names; give a function that writes further samples."""
    state = folder / "state"
    records.create(state, memory=80 * GIB, context_bytes=GIB // 2)
    idle = [subprocess.Popen(["sleep", "600"]) for _ in range(PROCESSES)]
    try:
        uuids = {f"cuda:{index}": records.uuid_of(index) for index in range(GPUS)}
        space = process_identity.pid_space()
        slots, logs = [], []
        for number, process in enumerate(idle):
            own, started = number % GPUS, process_identity.started(process.pid)
            contexts = {own} | ({0} if number == 13 else set())
            held = [7 * GIB if index in contexts else 0 for index in range(records.DEVICES)]
            numbers = [*held, *held, *[0] * 3 * records.DEVICES]
            mask = sum(1 << index for index in contexts)
            slots.append(records.PROCESS.pack(process.pid, GPUS, number, started, mask, 0, b"sleep", *numbers))
            first = {"pid": process.pid, "host": "here", "command": "python train.py", "RANK": str(number)}
            first |= {"time": time.time(), "started": started, "pid_space": space, "DEVGUARD_SIM_STATE": str(state)}
            tags = [f"cuda:{index}" for index in sorted(contexts)]
            owner = {"process_owner": f"cuda:{own}", "owned": [f"cuda:{own}"], "contexts": tags, "gpus": uuids}
            path = folder / f"{process.pid}.jsonl"
            path.write_text(
                json.dumps({"process": first}) + "\n" + json.dumps({"state": owner, "time": time.time()}) + "\n"
            )
            logs.append((path, tags))
        raw = bytearray(state.read_bytes())
        raw[: records.HEADER.size] = records.HEADER.pack(
            records.MAGIC,
            records.VERSION,
            records.SLOTS,
            records.PROCESS.size,
            PROCESSES,
            80 * GIB,
            GIB // 2,
            PROCESSES,
        )
        raw[records.HEADER.size : records.HEADER.size + len(slots) * records.PROCESS.size] = b"".join(slots)
        state.write_bytes(raw)

        def write(step: int) -> None:
            for path, tags in logs:
                memory = {tag: [step, 7 * GIB + step, step] for tag in tags}
                with open(path, "a", encoding="utf-8") as file:
                    # Of the future: the command does not wait for samples that these processes never write.
                    file.write(json.dumps({"now": {"memory": memory, "strays": 0}, "time": time.time() + 1e6}) + "\n")

        write(0)
        yield write
    finally:
        for process in idle:
            process.kill()
            process.wait()


def _watching() -> list[Row]:
    """Measure the first screen as a command, and each further second in this process, in milliseconds."""
    from rich.console import Console

    with tempfile.TemporaryDirectory() as place, crowd(Path(place)) as write, open(os.devnull, "w") as nowhere:
        command = [sys.executable, "-m", "devguard", "watch", "--once", place]
        environ: dict[str, Any] = {**os.environ, "COLUMNS": "120"}
        firsts = []
        for step in range(ROUNDS):
            write(step)  # in place of what the processes would write
            start = time.perf_counter()
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
            firsts.append((time.perf_counter() - start) * 1000)
            assert done.returncode == 3, done.stdout
        view, screen = View(Path(place)), Screen("benchmark", 1.0)
        console = Console(file=nowhere, width=120, height=40, force_terminal=True)
        seconds = []
        for step in range(ROUNDS):
            write(ROUNDS + step)
            begun = time.thread_time()
            screen.take(view.look())
            console.print(to_text(screen.lines(120, 40)))
            seconds.append((time.thread_time() - begun) * 1000)
    what = f"{PROCESSES} processes on {GPUS} GPUs"
    return [
        row(f"devguard watch --once, {what}, the whole command", firsts, 500.0, "ms"),
        row(f"devguard watch, {what}, each further second", seconds[1:], 10.0, "ms", statistics.median(seconds)),
    ]


def watching() -> list[Row]:
    return _being_watched() + _watching()
