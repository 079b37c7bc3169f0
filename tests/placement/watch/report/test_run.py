"""The report of a killed run agrees with the simulation, to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from devguard import simgpu
from devguard.reporting import sampler
from devguard.watch.report import page
from devguard.watch.report.run import Run, read
from devguard.watch.report.summary import summarize
from tests.helpers.pages import Page
from tests.helpers.simulated import ROOT

# Each rank owns the GPU of its number. Rank 1 leaves tensors on GPU 0, rank 2 only opens a context there.
PROGRAM = """
import io, os, sys, time
import torch, devguard
from devguard.reporting import sampler
sampler.INTERVAL_S = 0.01
rank = int(os.environ["RANK"])
saved = io.BytesIO()
torch.save(torch.ones(5000, 700 + rank, device="cuda:0"), saved) if rank == 1 else None
with devguard.guard(rank, mode="observe"):
    own = [torch.ones((3 + number) << 18, device="cuda") for number in range(rank + 2)]
    del own[0]
    if rank == 1:
        saved.seek(0)
        strays = [torch.load(saved)]
        strays += [torch.empty(12345, device="cuda:0")]
    if rank == 2:
        torch.cuda.synchronize("cuda:0")
        torch.cuda.set_device(0); torch.zeros(0, device="cuda"); torch.cuda.current_stream(0).synchronize()
    print("ready", flush=True)
    time.sleep(600)
"""
RANKS = range(3)


def held(pids: list[int]) -> dict[tuple[int, int], int]:
    """Return the bytes of each context by process and GPU, as the simulation counts them."""
    return {
        (process.pid, gpu.index): gpu.bytes
        for process in simgpu.state()
        if process.pid in pids
        for gpu in process.devices
        if gpu.context
    }


def shown(run: Run) -> dict[tuple[int, int], Any]:
    """Return the same, as the report shows it at the last moment."""
    labels = {column.uuid: int(column.label) for column in run.history.columns}
    return {
        (track.journal.process.pid, labels[uuid]): cell.bytes
        for track in run.tracks
        for uuid, cell in track.cells(run.history.last).items()
    }


def test_the_report_of_a_killed_run_agrees_with_the_simulation(tmp_path: Path) -> None:
    (tmp_path / sampler.RECORDED).touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    environ = {**os.environ, "DEVGUARD": "observe", "DEVGUARD_LOG": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py")],
            cwd=ROOT,
            env={**environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in RANKS
    ]
    pids = [process.pid for process in processes]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 60
        while shown(read(tmp_path)) != held(pids):
            assert time.monotonic() < end, (shown(read(tmp_path)), held(pids))
            time.sleep(0.02)
        assert summarize(read(tmp_path)).running == len(RANKS)  # during the run
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    run = read(tmp_path)  # after the crash
    state = held(pids)
    assert shown(run) == state
    astray = {(pid, gpu): nbytes for (pid, gpu), nbytes in state.items() if gpu != pids.index(pid)}
    assert astray.keys() == {(pids[1], 0), (pids[2], 0)}
    assert astray[pids[1], 0] > 5000 * 701 * 4
    found = summarize(run)
    assert (found.running, found.misplaced_processes, found.misplaced_contexts) == (0, 2, 2)
    assert found.misplaced_bytes == run.history.worst.bytes == sum(astray.values())
    for column in run.columns():
        there = sum(nbytes for (_, gpu), nbytes in state.items() if gpu == int(column.label))
        assert run.history.peaks[column.uuid].bytes >= there
    # The page has the same numbers.
    shown_page = Page(page.render([("", run)]))
    values = shown_page.values[shown_page.tables.index(shown_page.table("process"))]
    assert values == [
        *(state[pid, gpu] for pid in pids for gpu in range(3) if (pid, gpu) in state),
        *(sum(state.get((pid, gpu), 0) for pid in pids) for gpu in range(3)),
    ]
    assert shown_page.texts["unseen"].count("killed or crashed (no last line)") == len(RANKS)
