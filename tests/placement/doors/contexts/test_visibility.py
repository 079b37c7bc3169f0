"""The door ``visibility`` on simulated GPUs: CUDA_VISIBLE_DEVICES changed too late, and ranks that share a GPU."""

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
from devguard.doors.contexts import visibility
from devguard.ownership.prepare import on_prepare
from devguard.reporting.journal import journal
from tests.helpers.programs import run_child
from tests.helpers.simulated import ROOT

UUID = "64657667-7561-7264-0000-00000000000"  # followed by the number of the simulated GPU


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    """Give each test a runtime directory, so that it shares its claims with no other test."""
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
    """Run `code` in a fresh process; return the JSON that it prints."""
    return json.loads(run_child(code, prelude=PRELUDE, options=["-W", "error"], environment=variables))


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
            ("2,3", None, 0, f"CUDA_VISIBLE_DEVICES was unset after CUDA had read it: cuda:0 is GPU {UUID}2"),
        ],
    )
    def test_a_change_that_gives_the_owners_index_another_gpu_is_recorded(self, start, value, index, words):
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
            (None, "'0,1,2,3'", 1),  # the same list in full
            (None, "'0,1'", 1),  # hides other GPUs only
            ("2,3", "'2'", 0),
            ("2", f"'GPU-{UUID}2'", 0),
            (None, "'MIG-x'", 0),  # NVML cannot match it
        ],
    )
    def test_a_change_that_leaves_the_owner_its_gpu_is_no_stray(self, start, value, index):
        code = f"""
torch.cuda.init()
os.environ['CUDA_VISIBLE_DEVICES'] = {value}
with devguard.guard({index}, mode="error"): pass
print(json.dumps(rows()))
"""
        assert child(code, **({"CUDA_VISIBLE_DEVICES": start} if start else {})) == []

    def test_a_change_before_cuda_reads_the_variable_is_no_stray(self):
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

    def test_error_mode_refuses_every_entry_and_leaves_no_scope_entered(self):
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
        assert all("before CUDA is initialised" in error and "Call site: <string>" in error for error in errors)
        assert owner == "None"

    def test_warn_warns_once_and_off_and_allowed_record_nothing(self):
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

    def test_the_status_reports_a_change_after_the_entry(self):
        code = """
with devguard.guard(0):
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    print(json.dumps([rows(), door()["changed"]]))
"""
        rows, changed = child(code)
        assert rows == []
        assert "means other devices" in changed

    def test_uninstall_ends_the_check(self):
        with guard(0):
            assert visibility._check in on_prepare
        devguard.uninstall()
        assert visibility._check not in on_prepare

    def test_a_check_that_fails_is_a_problem_in_the_status_and_the_guard_is_entered(self, monkeypatch):
        def broken(index: int) -> str:
            raise RuntimeError("no properties")

        monkeypatch.setattr("devguard.support.accelerator.uuid_of", broken)
        with guard(1, mode="error"):
            assert torch.cuda.current_device() == 1
            assert "no properties" in devguard.status()["doors"]["visibility"]["problem"]

    def test_the_status_does_not_initialise_cuda(self):
        code = """
with devguard.guard("cpu"):
    row = door()
from devguard.support import accelerator
print(json.dumps([torch.cuda.is_initialized(), accelerator.driver_is_initialized(), "devices" in row]))
"""
        assert child(code) == [False, False, False]

    def test_the_check_opens_no_context_on_another_device(self):
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
    """A process that enters a guard, reports what it found, and stays in the guard until the end of the block."""

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
    def test_two_ranks_of_one_job_on_one_gpu_are_recorded(self):
        """RANK-INDEX in README.md: each rank r takes ``cuda:r`` of its own list."""
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
    def test_other_processes_may_share_a_gpu_and_are_listed_in_the_status(self, variables):
        with Rank("1", LOCAL_RANK="0", **JOB), Rank("1", **variables) as second:
            assert second == [[], [], 1]

    def test_error_mode_refuses_and_two_switches_turn_the_check_off(self):
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

    def test_the_status_names_the_folder_that_holds_the_claims(self, runtime):
        with guard(1):
            folder = Path(devguard.status()["doors"]["visibility"]["claims"])
            assert folder == runtime / "devguard"
            assert [path.name for path in folder.iterdir()] == [f"{UUID}1.json"]

    def test_uninstall_releases_the_claim(self, runtime):
        claims = runtime / "devguard" / f"{UUID}1.json"
        with guard(1):
            assert [row["pid"] for row in json.loads(claims.read_text())] == [os.getpid()]
        devguard.uninstall()
        assert json.loads(claims.read_text()) == []

    def test_an_unusable_folder_is_a_problem_in_the_status_and_the_guard_is_entered(self, runtime):
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
    ids=["different lists", "a pool", "different GPUs"],
)
def test_two_children_of_one_parent_are_recorded_if_different_lists_give_them_one_gpu(first, second, strays):
    context = mp.get_context("spawn")
    results, done = context.SimpleQueue(), context.Event()
    processes, got = [], []
    for settings in (first, second):
        processes.append(context.Process(target=own, args=(*settings, results, done)))
        processes[-1].start()
        got.append(results.get())
    done.set()
    for process in processes:
        process.join()
    assert got[0] == []
    assert [row[:2] for row in got[1]] == ([("visibility", f"GPU-{UUID}0")] if strays else [])
    assert all("another child of the same parent" in row[2] for row in got[1])
