"""The door ``visibility`` on real devices: CUDA_VISIBLE_DEVICES changed too late, and ranks that own one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import devguard
from devguard import guard
from devguard.doors.contexts import gpu_claims, visibility
from devguard.ownership.prepare import on_prepare
from devguard.reporting.journal import journal
from tests.helpers.simulated import ROOT

UUID = "64657667-7561-7264-0000-00000000000"  # and the number of the simulated GPU


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    """A runtime directory of its own: what a test claims is nobody else's."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


PRELUDE = """
import json, os, sys, torch, devguard
from devguard.reporting.journal import journal
def rows():
    return [(s.door, s.source, s.owner, s.action, s.site and s.site.function) for s in journal.strays()]
def note():
    return [s.note for s in journal.strays()]
def door():
    return devguard.status()["doors"]["visibility"]
"""


def child(code: str, **variables: str) -> Any:
    """Run `code` in a fresh process on the same simulated GPUs; what it prints."""
    environment = {**os.environ, **variables}
    command = [sys.executable, "-W", "error", "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


class TestChangedVariable:
    @pytest.mark.parametrize(
        ("start", "value", "index", "words"),
        [
            (None, "'1'", 0, f"would be GPU {UUID}1, NVML index 1"),
            (None, "'2,3'", 1, f"would be GPU {UUID}3, NVML index 3"),
            (None, "'1'", 1, "would be no device at all"),
            (None, f"'GPU-{UUID}2'", 0, f"would be GPU {UUID}2, NVML index 2"),
            (None, "'1,1'", 0, "would be no device at all"),
            (None, "''", 0, "would be no device at all"),
            ("2,3", "'3,2'", 0, f"cuda:0 is GPU {UUID}2, NVML index 2, and would be GPU {UUID}3"),
            ("2,3", None, 0, f"CUDA_VISIBLE_DEVICES was unset after CUDA had looked: cuda:0 is GPU {UUID}2"),
        ],
    )
    def test_is_detected_where_the_owners_index_means_another_gpu(self, start, value, index, words):
        change = f"os.environ['CUDA_VISIBLE_DEVICES'] = {value}" if value else "del os.environ['CUDA_VISIBLE_DEVICES']"
        code = f"""
torch.cuda.init()
{change}
def work():
    with devguard.guard({index}): return torch.cuda.current_device()
device = work()
print(json.dumps([device, rows(), note()[0]]))
"""
        device, rows, note = child(code, **({"CUDA_VISIBLE_DEVICES": start} if start else {}))
        source = f"GPU-{UUID}{index if start is None else start.split(',')[index]}"
        assert (device, rows) == (index, [["visibility", source, f"cuda:{index}", "observed", "work"]])
        assert words in note

    @pytest.mark.parametrize(
        ("start", "value", "index"),
        [
            (None, "'0,1,2,3'", 1),  # the same in other words
            (None, "'0,1'", 1),  # others are hidden, the owner's is not
            ("2,3", "'2'", 0),
            ("2", f"'GPU-{UUID}2'", 0),
            (None, "'MIG-x'", 0),  # nobody can tell
        ],
    )
    def test_is_no_stray_where_the_owner_keeps_its_gpu(self, start, value, index):
        code = f"""
torch.cuda.init()
os.environ['CUDA_VISIBLE_DEVICES'] = {value}
with devguard.guard({index}, mode="error"): pass
print(json.dumps(rows()))
"""
        assert child(code, **({"CUDA_VISIBLE_DEVICES": start} if start else {})) == []

    def test_before_cuda_looked_it_is_no_stray(self):
        code = """
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
with devguard.guard(0, mode="error"): pass
print(json.dumps([rows(), door()]))
"""
        rows, row = child(code)
        assert rows == []
        assert row["devices"] == {"cuda:0": {"uuid": f"{UUID}3", "nvml_index": 3}}
        assert (row["visible_at_start"], row["visible_now"]) == (None, "3")
        assert "changed" not in row

    def test_error_refuses_the_guard_every_time_and_leaves_nothing_entered(self):
        code = """
torch.cuda.init()
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
errors = []
for _ in range(2):
    try:
        with devguard.guard(0, mode="error"): pass
    except devguard.StrayDeviceError as error: errors.append(str(error))
try: devguard.install("error", 0)
except devguard.StrayDeviceError as error: errors.append(str(error))
with devguard.guard(1, mode="repair"):
    try:
        with devguard.guard(0, doors={"visibility": "error"}): pass
    except devguard.StrayDeviceError as error: errors.append(str(error))
print(json.dumps([errors, str(devguard.owner())]))
"""
        errors, owner = child(code)
        assert len(errors) == 4
        assert all("before anything touches CUDA" in error and "Call site: <string>" in error for error in errors)
        assert owner == "None"

    def test_warn_says_it_once_and_off_unguarded_and_allowed_say_nothing(self):
        code = """
import warnings
torch.cuda.init()
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
def enter(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with devguard.guard(0, **options): pass
        with devguard.guard(0, **options): pass
    devguard.uninstall()
    return [str(w.message) for w in caught]
off = enter(mode="off") + enter(doors={"visibility": "off"})
devguard.allow("cuda:0")
off += enter()
print(json.dumps([off, rows(), enter(mode="warn"), len(rows())]))
"""
        off, rows, warned, count = child(code)
        assert (off, rows, count) == ([], [], 1)
        assert len(warned) == 1
        assert "CUDA_VISIBLE_DEVICES was set to '1'" in warned[0]

    def test_the_status_tells_of_a_later_change(self):
        code = """
with devguard.guard(0):
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    print(json.dumps([rows(), door()["changed"]]))
"""
        rows, changed = child(code)
        assert rows == []
        assert "means other devices" in changed

    def test_looking_is_over_with_uninstall(self):
        with guard(0):
            assert visibility._look in on_prepare
        devguard.uninstall()
        assert visibility._look not in on_prepare

    def test_what_cannot_be_looked_at_keeps_nobody_from_working(self, monkeypatch):
        def broken(index: int) -> str:
            raise RuntimeError("no properties")

        monkeypatch.setattr("devguard.support.accelerator.uuid_of", broken)
        with guard(1, mode="error"):
            assert torch.cuda.current_device() == 1
            assert "no properties" in devguard.status()["doors"]["visibility"]["problem"]

    def test_the_status_initialises_nothing(self):
        code = """
with devguard.guard("cpu"):
    row = door()
from devguard.support import accelerator
print(json.dumps([torch.cuda.is_initialized(), accelerator.initialized(), "devices" in row]))
"""
        assert child(code) == [False, False, False]

    def test_the_look_opens_no_context(self):
        code = """
with devguard.guard(2): pass
print(json.dumps([d.index for d in devguard.contexts()]))
"""
        assert child(code) == [2]


RANK = """
import contextlib
with devguard.guard(int(sys.argv[1]) if len(sys.argv) > 1 else None):
    shared = list(door()["shared_with"].values())[0]
    print(json.dumps([rows(), note(), len(shared)]), flush=True)
    input()
"""


class Rank:
    """A process that enters a guard, says what it found, and stays in it until the end of the block."""

    def __init__(self, *arguments: str, code: str = RANK, **variables: str) -> None:
        command = [sys.executable, "-W", "error", "-c", PRELUDE + code, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, **pipes)

    def __enter__(self) -> Any:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read().decode()
        return json.loads(line)

    def __exit__(self, *error: object) -> None:
        self.process.communicate(b"\n")


JOB = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


class TestRanksThatOwnOneGpu:
    def test_two_ranks_of_one_job_with_other_visible_lists(self):
        """RANK-INDEX of the table of doors: each rank r takes ``cuda:r`` of its own list."""
        with Rank(LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="0,1", **JOB) as first:
            assert first == [[], [], 0]
            with Rank(LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="1,0", **JOB) as second:
                rows, (note,), shared = second
                assert rows == [["visibility", f"GPU-{UUID}0", "cuda:1", "observed", "<module>"]]
                assert note.startswith(f"cuda:1 is GPU {UUID}0, which local rank 0 of the same job")
                assert "(local rank 0, cuda:0 there, CUDA_VISIBLE_DEVICES '0,1')" in note
                assert shared == 1

    def test_ranks_with_their_own_gpus_are_no_strays(self):
        with Rank(LOCAL_RANK="0", **JOB) as first, Rank(LOCAL_RANK="1", **JOB) as second:
            assert first == second == [[], [], 0]

    def test_ranks_of_a_job_that_has_ended_are_forgotten(self):
        with Rank("1", LOCAL_RANK="0", **JOB):
            pass
        with Rank("1", LOCAL_RANK="1", **JOB) as second:
            assert second == [[], [], 0]

    @pytest.mark.parametrize(
        "variables",
        [{}, {"LOCAL_RANK": "1"}, {**JOB, "MASTER_PORT": "1", "LOCAL_RANK": "1"}, {**JOB, "LOCAL_RANK": "0"}],
        ids=["alone", "no job", "another job", "the same rank"],
    )
    def test_everybody_else_may_share_and_is_information(self, variables):
        with Rank("1", LOCAL_RANK="0", **JOB), Rank("1", **variables) as second:
            assert second == [[], [], 1]

    def test_error_refuses_and_the_switches_switch_it_off(self):
        refusing = """
try:
    with devguard.guard(1, mode="error"): pass
except devguard.StrayDeviceError as error: print(json.dumps(str(error)))
"""
        off = 'with devguard.guard(1, doors={"visibility": "off"}): print(json.dumps(rows()))'
        locked = """
with devguard.guard(1, mode="error"): print(json.dumps([rows(), door()["claims"], "shared_with" in door()]))
"""
        with Rank("1", LOCAL_RANK="0", **JOB):
            assert "Give each rank its own GPU" in child(refusing, LOCAL_RANK="1", **JOB)
            assert child(off, LOCAL_RANK="1", **JOB) == []
            assert child(locked, LOCAL_RANK="1", DEVGUARD_RANK_LOCK="off", **JOB) == [[], "off", False]

    def test_uninstall_takes_the_claim_back(self, runtime):
        with guard(1):
            assert [row["pid"] for row in json.loads((runtime / "devguard" / f"{UUID}1.json").read_text())] == [
                os.getpid()
            ]
        devguard.uninstall()
        assert json.loads((runtime / "devguard" / f"{UUID}1.json").read_text()) == []

    def test_a_folder_that_cannot_be_used_keeps_nobody_from_working(self, runtime):
        (runtime / "devguard").write_text("in the way")
        with guard(1, mode="error"):
            assert "Error" in devguard.status()["doors"]["visibility"]["problem"]
        assert journal.strays() == ()


def own(index: int, visible: str, results: mp.SimpleQueue, done: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    with guard(index):
        results.put([(stray.door, stray.source, stray.note) for stray in devguard.strays()])
        done.wait()


@pytest.mark.parametrize(
    ("first", "second", "strays"),
    [((0, "0,1"), (1, "1,0"), True), ((0, "0,1"), (0, "0,1"), False), ((0, "0,1"), (1, "0,1"), False)],
    ids=["told different things", "a pool", "each its own"],
)
def test_two_children_of_one_parent(first, second, strays):
    context = mp.get_context("spawn")
    results, done = context.SimpleQueue(), context.Event()
    processes, got = [], []
    for told in (first, second):
        processes.append(context.Process(target=own, args=(*told, results, done)))
        processes[-1].start()
        got.append(results.get())
    done.set()
    for process in processes:
        process.join()
    assert got[0] == []
    assert [row[:2] for row in got[1]] == ([("visibility", f"GPU-{UUID}0")] if strays else [])
    assert all("another child of the same parent" in row[2] for row in got[1])


def test_the_claims_are_those_of_ranks():
    assert visibility.gpu_claims is gpu_claims
