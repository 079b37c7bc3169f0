"""Claims of physical GPUs: which claims are alive, which clash, and how damaged files are handled."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.doors.contexts import gpu_claims
from devguard.doors.contexts.gpu_claims import Claim
from devguard.ownership.resolve import LAUNCHERS
from tests.helpers.simulated import ROOT

UUID = "64657667-0000-0000-0000-000000000001"
FIELDS = [field.name for field in fields(Claim)]
CONTENTS = {
    "not UTF-8": b"\xff\xfe[",
    "UTF-16": "[]".encode("utf-16"),
    "NUL": b"\0" * 100,
    "huge": b" " * (gpu_claims.MAX_BYTES + 1),
    "huge number": b'[{"pid": ' + b"1" * 5000 + b"}]",
    "deep": b"[" * 100_000,
    "NaN": b"[NaN]",
    "number": b"5",
    "text": b'"claims"',
    "pid of another type": json.dumps([dict.fromkeys(FIELDS, "../../dev/tty")]).encode(),
    "list in place of text": json.dumps([{name: [] for name in FIELDS}]).encode(),
    "negative": json.dumps([dict.fromkeys(FIELDS, -1)]).encode(),
}


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Iterator[Path]:
    """A runtime directory for this test alone, and an environment without a launcher."""
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
        started = gpu_claims._start_time(process.pid)
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
    def test_a_claim_returns_the_claims_of_other_living_processes(self, other):
        assert gpu_claims.claim(UUID, 1) == [other]
        assert gpu_claims.others(UUID) == [other]
        assert sorted(written()) == sorted([other.pid, os.getpid()])

    def test_a_second_claim_of_one_process_replaces_the_first(self):
        assert gpu_claims.claim(UUID, 1) == gpu_claims.claim(UUID, 1) == []
        assert written() == [os.getpid()]

    def test_the_claims_of_dead_processes_are_dropped(self, other):
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        write(other, replace(other, pid=process.pid))
        assert gpu_claims.claim(UUID, 1) == [other]
        assert process.pid not in written()

    def test_a_claim_with_a_reused_pid_is_dropped(self, other):
        write(replace(other, started=other.started + 1))
        assert gpu_claims.claim(UUID, 1) == []

    def test_of_many_claims_of_one_process_the_last_counts_and_the_process_is_looked_up_once(self, other, monkeypatch):
        looked: list[int] = []
        start_time = gpu_claims._start_time
        monkeypatch.setattr(gpu_claims, "_start_time", lambda pid: looked.append(pid) or start_time(pid))
        reused = replace(other, started=other.started + 1, index=8000)
        write(*(replace(other, index=index) for index in range(7000)), reused)
        assert gpu_claims.others(UUID) == [replace(other, index=6999)]
        assert written() == looked == [other.pid]

    def test_the_claim_of_a_zombie_is_dropped(self, other):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        write(replace(other, pid=process.pid, started=gpu_claims._start_time(process.pid) or 0))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not reaped
        assert gpu_claims.claim(UUID, 1) == []
        process.communicate()

    def test_release_removes_only_the_claims_of_this_process(self, other):
        gpu_claims.claim(UUID, 1)
        gpu_claims.release()
        assert written() == [other.pid]
        gpu_claims.release()
        assert written() == [other.pid]

    def test_release_in_a_fork_leaves_the_parents_claim(self):
        gpu_claims.claim(UUID, 1)
        child = multiprocessing.get_context("fork").Process(target=gpu_claims.release)
        child.start()
        child.join()
        assert written() == [os.getpid()]

    @pytest.mark.parametrize("text", ["", "[{", "{}", "[1]", '[{"pid": 1}]', "null"])
    def test_a_malformed_file_is_read_as_empty(self, text):
        (gpu_claims.folder() / f"{UUID}.json").write_text(text)
        assert gpu_claims.claim(UUID, 1) == []
        assert written() == [os.getpid()]

    @pytest.mark.parametrize("content", CONTENTS)
    def test_a_file_of_any_bytes_is_read_as_empty_and_replaced(self, content):
        (gpu_claims.folder() / f"{UUID}.json").write_bytes(CONTENTS[content])
        assert gpu_claims.others(UUID) == []
        (gpu_claims.folder() / f"{UUID}.json").write_bytes(CONTENTS[content])
        assert gpu_claims.claim(UUID, 1) == []
        assert written() == [os.getpid()]

    def test_valid_claims_beside_invalid_ones_are_kept(self, other):
        rows = [asdict(other), 5, None, {**asdict(other), "pid": "../../dev/tty"}, {**asdict(other), "job": []}]
        (gpu_claims.folder() / f"{UUID}.json").write_text(json.dumps(rows))
        assert gpu_claims.claim(UUID, 1) == [other]

    @given(
        st.binary()
        | st.text().map(str.encode)
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner),
        ).map(lambda value: json.dumps(value).encode())
        | st.lists(
            st.fixed_dictionaries(
                {name: st.none() | st.integers() | st.text() | st.lists(st.integers(), max_size=1) for name in FIELDS}
            )
        ).map(lambda value: json.dumps(value).encode())
    )
    def test_no_content_makes_the_reader_fail(self, content):
        for claim in gpu_claims._read(content):
            assert gpu_claims._start_time(claim.pid) != claim.started or claim.pid in range(1, 1 << 22)
            gpu_claims.describe_clash(claim, 0)
            str(claim)

    def test_no_claim_is_lost_when_many_processes_claim_at_the_same_time(self):
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


class TestObstacles:
    """What lies at the place of the file: a claim fails at once, with an OSError, which the door reports."""

    @pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "link to nothing"])
    def test_what_is_no_file_is_refused_and_not_waited_for(self, kind):
        path = gpu_claims.folder() / f"{UUID}.json"
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            here = os.open(".", os.O_RDONLY)
            os.chdir(path.parent)  # the path of a socket must be short
            try:
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(path.name)
            finally:
                os.fchdir(here)
                os.close(here)
        else:
            path.symlink_to(path.parent / "nothing")
        with pytest.raises(OSError, match=UUID):
            gpu_claims.claim(UUID, 1)
        gpu_claims.release()

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
    def test_a_file_that_cannot_be_written_is_refused(self):
        path = gpu_claims.folder() / f"{UUID}.json"
        path.write_text("")
        path.chmod(0o400)
        with pytest.raises(PermissionError):
            gpu_claims.claim(UUID, 1)

    def test_a_lock_that_another_process_holds_is_not_waited_for(self, monkeypatch):
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        path = gpu_claims.folder() / f"{UUID}.json"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                gpu_claims.claim(UUID, 1)
            with pytest.raises(BlockingIOError):
                gpu_claims.others(UUID)
            gpu_claims.release()
        assert 0 < sum(pauses) < 1
        assert gpu_claims.claim(UUID, 1) == []

    def test_a_full_disk_loses_no_claim_of_another_process(self, other, monkeypatch):
        def fail(*args: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", fail)
            with pytest.raises(OSError, match="No space"):
                gpu_claims.claim(UUID, 1)
        assert written() == [other.pid]

    def test_no_descriptor_is_left_open(self):
        os.mkfifo(gpu_claims.folder() / f"{UUID}.json")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=UUID):
            gpu_claims.claim(UUID, 1)
        assert os.listdir("/proc/self/fd") == before


class TestFolder:
    def test_the_folder_is_private(self, runtime):
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

    def test_release_succeeds_after_the_folder_is_gone(self, runtime):
        gpu_claims.claim(UUID, 1)
        (gpu_claims.folder() / f"{UUID}.json").unlink()
        gpu_claims.folder().rmdir()
        (runtime / "devguard").write_text("in the way")
        gpu_claims.release()
        assert gpu_claims._claimed == {}
        (runtime / "devguard").unlink()
        assert gpu_claims.others(UUID) == []


@pytest.mark.parametrize(("value", "expected"), [("off", False), ("0", False), ("OFF ", False), ("on", True)])
def test_the_environment_variable_switches_claims_off(monkeypatch, value, expected):
    assert gpu_claims.is_enabled()
    monkeypatch.setenv(gpu_claims.VARIABLE, value)
    assert gpu_claims.is_enabled() is expected


class TestClash:
    @pytest.mark.parametrize("names", gpu_claims.JOBS)
    def test_two_local_ranks_of_one_job_clash(self, names, monkeypatch):
        for name in names:
            monkeypatch.setenv(name, "x1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        own = gpu_claims._make_claim(0)
        other = replace(own, pid=1, local_rank="0")
        assert "local rank 0 of the same job" in (gpu_claims.describe_clash(other, 0) or "")
        assert gpu_claims.describe_clash(replace(other, local_rank="1"), 0) is None  # a helper process of this rank
        assert gpu_claims.describe_clash(replace(other, local_rank=""), 0) is None
        assert gpu_claims.describe_clash(replace(other, job="another"), 0) is None
        assert gpu_claims.describe_clash(replace(other, job=""), 0) is None

    def test_without_a_launcher_two_local_ranks_do_not_clash(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert gpu_claims.describe_clash(replace(gpu_claims._make_claim(0), pid=1, local_rank="0"), 0) is None

    def test_a_local_rank_of_minus_one_is_ignored(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "-1")
        assert gpu_claims._make_claim(0).local_rank == ""

    def test_unrelated_processes_do_not_clash(self, other):
        assert gpu_claims.describe_clash(other, 0) is None

    def test_children_of_one_parent_clash_if_they_were_configured_differently(self, monkeypatch):
        class Parent:
            pid = os.getpid()

        monkeypatch.setattr(multiprocessing.process, "parent_process", Parent)
        own = gpu_claims._make_claim(0)
        assert own.parent
        same = replace(own, pid=1)
        assert gpu_claims.describe_clash(same, 0) is None  # the workers of a pool, which share a GPU on purpose
        for change in ({"index": 1}, {"visible": "1,0"}, {"local_rank": "1"}):
            assert "another child of the same parent" in (gpu_claims.describe_clash(replace(same, **change), 0) or "")
        assert gpu_claims.describe_clash(replace(same, parent="1 1", index=1), 0) is None

    def test_the_text_of_a_claim_names_the_process_and_its_devices(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        expected = f"pid {os.getpid()} (local rank 1, cuda:0 there, CUDA_VISIBLE_DEVICES '1,0')"
        assert str(gpu_claims._make_claim(0)) == expected
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert "CUDA_VISIBLE_DEVICES unset" in str(gpu_claims._make_claim(0))
