"""Claims of physical GPUs: who is alive, who clashes with whom, and what may go wrong with the files."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from devguard.doors.contexts import gpu_claims
from devguard.doors.contexts.gpu_claims import Claim
from devguard.ownership.resolve import LAUNCHERS
from tests.helpers.simulated import ROOT

UUID = "64657667-0000-0000-0000-000000000001"


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Iterator[Path]:
    """A runtime directory of its own, and an environment without a launcher."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    named = {name for row in gpu_claims.JOBS for name in row} | {launcher.rank for launcher in LAUNCHERS}
    for name in (*named, "CUDA_VISIBLE_DEVICES", gpu_claims.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_claims, "_claimed", {})
    yield tmp_path
    gpu_claims.release()


@pytest.fixture
def other() -> Iterator[Claim]:
    """The claim of another living process, written to the file."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = gpu_claims._started(process.pid)
        assert started
        claim = Claim(process.pid, started, "", "", "", 3, None)
        write(claim)
        yield claim
        process.kill()


def write(*claims: Claim) -> None:
    (gpu_claims.folder() / f"{UUID}.json").write_text(json.dumps([asdict(claim) for claim in claims]))


def written() -> list[int]:
    return [row["pid"] for row in json.loads((gpu_claims.folder() / f"{UUID}.json").read_text())]


class TestClaims:
    def test_the_first_finds_nobody_and_the_living_find_each_other(self, other):
        assert gpu_claims.claim(UUID, 1) == [other]
        assert gpu_claims.others(UUID) == [other]
        assert sorted(written()) == sorted([other.pid, os.getpid()])

    def test_a_second_claim_of_one_process_replaces_the_first(self):
        assert gpu_claims.claim(UUID, 1) == gpu_claims.claim(UUID, 1) == []
        assert written() == [os.getpid()]

    def test_the_dead_are_dropped(self, other):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        write(other, replace(other, pid=process.pid))
        assert gpu_claims.claim(UUID, 1) == [other]
        assert process.pid not in written()

    def test_a_pid_that_was_used_again_is_dead(self, other):
        write(replace(other, started=other.started + 1))
        assert gpu_claims.claim(UUID, 1) == []

    def test_a_zombie_is_dead(self, other):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        write(replace(other, pid=process.pid, started=gpu_claims._started(process.pid) or 0))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not reaped
        assert gpu_claims.claim(UUID, 1) == []
        process.communicate()

    def test_release_takes_back_what_is_ours_only(self, other):
        gpu_claims.claim(UUID, 1)
        gpu_claims.release()
        assert written() == [other.pid]
        gpu_claims.release()

    def test_release_in_a_fork_leaves_the_parents_claim(self):
        gpu_claims.claim(UUID, 1)
        child = multiprocessing.get_context("fork").Process(target=gpu_claims.release)
        child.start()
        child.join()
        assert written() == [os.getpid()]

    @pytest.mark.parametrize("text", ["", "[{", "{}", "[1]", '[{"pid": 1}]', "null"])
    def test_a_file_that_makes_no_sense_is_empty(self, text):
        (gpu_claims.folder() / f"{UUID}.json").write_text(text)
        assert gpu_claims.claim(UUID, 1) == []
        assert written() == [os.getpid()]

    def test_many_at_once_lose_none(self):
        code = (
            f"from devguard.doors.contexts import gpu_claims; gpu_claims.claim({UUID!r}, 0); print(flush=True); input()"
        )
        command = [sys.executable, "-c", code]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(6)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        assert sorted(claim.pid for claim in gpu_claims.others(UUID)) == sorted(process.pid for process in processes)
        for process in processes:
            process.communicate(b"\n")
        assert gpu_claims.others(UUID) == []


class TestFolder:
    def test_is_private(self, runtime):
        assert gpu_claims.folder() == runtime / "devguard"
        assert gpu_claims.folder().stat().st_mode & 0o777 == 0o700

    def test_without_a_runtime_directory_it_is_under_the_temporary_one(self, runtime, monkeypatch):
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.setattr("tempfile.tempdir", str(runtime))
        assert gpu_claims.folder() == runtime / f"devguard-{os.getuid()}"

    def test_a_folder_that_others_can_write_to_is_refused(self, runtime):
        gpu_claims.folder().chmod(0o777)
        with pytest.raises(PermissionError, match="only this user"):
            gpu_claims.claim(UUID, 1)

    def test_a_link_is_refused(self, runtime, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (runtime / "devguard").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PermissionError):
            gpu_claims.claim(UUID, 1)

    def test_a_file_that_is_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "precious").write_text("x")
        (gpu_claims.folder() / f"{UUID}.json").symlink_to(tmp_path / "precious")
        with pytest.raises(OSError, match=UUID):
            gpu_claims.claim(UUID, 1)
        assert (tmp_path / "precious").read_text() == "x"

    def test_a_folder_that_is_gone_does_not_stop_the_release(self, runtime):
        gpu_claims.claim(UUID, 1)
        (gpu_claims.folder() / f"{UUID}.json").unlink()
        gpu_claims.folder().rmdir()
        (runtime / "devguard").write_text("in the way")
        gpu_claims.release()


@pytest.mark.parametrize(("value", "expected"), [("off", False), ("0", False), ("OFF ", False), ("on", True)])
def test_the_switch(monkeypatch, value, expected):
    assert gpu_claims.enabled()
    monkeypatch.setenv(gpu_claims.VARIABLE, value)
    assert gpu_claims.enabled() is expected


class TestClash:
    @pytest.mark.parametrize("names", gpu_claims.JOBS)
    def test_two_local_ranks_of_one_job(self, names, monkeypatch):
        for name in names:
            monkeypatch.setenv(name, "x1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        mine = gpu_claims._mine(0)
        other = replace(mine, pid=1, local_rank="0")
        assert "local rank 0 of the same job" in (gpu_claims.clash(other, 0) or "")
        assert gpu_claims.clash(replace(other, local_rank="1"), 0) is None  # a helper process of this rank
        assert gpu_claims.clash(replace(other, local_rank=""), 0) is None
        assert gpu_claims.clash(replace(other, job="another"), 0) is None
        assert gpu_claims.clash(replace(other, job=""), 0) is None

    def test_without_a_launcher_the_local_rank_alone_says_nothing(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert gpu_claims.clash(replace(gpu_claims._mine(0), pid=1, local_rank="0"), 0) is None

    def test_a_rank_of_minus_one_is_none(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "-1")
        assert gpu_claims._mine(0).local_rank == ""

    def test_processes_that_nobody_relates_may_share(self, other):
        assert gpu_claims.clash(other, 0) is None

    def test_children_of_one_parent(self, monkeypatch):
        class Parent:
            pid = os.getpid()

        monkeypatch.setattr(multiprocessing.process, "parent_process", Parent)
        mine = gpu_claims._mine(0)
        assert mine.parent
        same = replace(mine, pid=1)
        assert gpu_claims.clash(same, 0) is None  # a pool, whose workers share a GPU on purpose
        for told in ({"index": 1}, {"visible": "1,0"}, {"local_rank": "1"}):
            assert "another child of the same parent" in (gpu_claims.clash(replace(same, **told), 0) or "")
        assert gpu_claims.clash(replace(same, parent="1 1", index=1), 0) is None

    def test_a_claim_in_words(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        expected = f"pid {os.getpid()} (local rank 1, cuda:0 there, CUDA_VISIBLE_DEVICES '1,0')"
        assert str(gpu_claims._mine(0)) == expected
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert "CUDA_VISIBLE_DEVICES unset" in str(gpu_claims._mine(0))
