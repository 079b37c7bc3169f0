"""Orphans in shared memory: what the rules permit to remove, and that nothing else is removed."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devguard.support import file_holders, orphans, shared_memory
from devguard.support.orphans import Plan
from tests.helpers.fakeproc import NEVER, FakeProc, takes_leases

ANY = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=60)
ENDED = NEVER
LATER = time.time() + 10**6  # when each file of a test is old


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shm"
    path.mkdir()
    return path


def make(folder: Path, name: str = f"torch_{ENDED}_1_1", size: int = 5000) -> Path:
    path = folder / name
    path.write_bytes(b"x" * size)
    return path


def names(segments: list[shared_memory.Segment]) -> list[str]:
    return [segment.name for segment in segments]


def reasons(kept: orphans.Kept) -> dict[str, str]:
    return {segment.name: reason for segment, reason in kept}


def find(folder: Path, proc: FakeProc, now: float = LATER) -> Plan:
    return orphans.find(folder, now=now, proc=proc.path)


def remove(plan: Plan, folder: Path, proc: FakeProc) -> orphans.Removal:
    return orphans.remove(plan, folder, now=LATER, proc=proc.path)


@pytest.mark.parametrize(
    "form",
    ["torch_{}_1_1", "sgl_shm_mm_{}_0a1b2c3d", "multi_tokenizer_args_{}", "pym-{}-abcdefgh", "sem.loky-{}-abcdefgh"],
)
def test_a_file_that_a_process_left_is_removed(folder: Path, proc: FakeProc, form: str) -> None:
    path = make(folder, form.format(ENDED))
    plan = find(folder, proc)
    assert names(plan.orphans) == [path.name]
    assert path.exists()
    removal = remove(plan, folder, proc)
    assert names(removal.removed) == [path.name]
    assert removal.removed[0].nbytes >= 5000
    assert (removal.kept, removal.obstacles) == ([], [])
    assert os.listdir(folder) == []


def link_to(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (f"torch_{os.getpid()}_1_1", None, f"process {os.getpid()} is running"),
        ("psm_0a1b2c3d", None, "its name carries no pid"),
        ("cuda.shm.0.2f.1", None, "its name carries no pid"),
        (f"mine_{ENDED}", None, "its name carries no pid"),
        (f"torch_{ENDED}_1_1", link_to, "it is no regular file"),
        (f"torch_{ENDED}_1_1", make_folder, "it is no regular file"),
        (f"torch_{ENDED}_1_1", make_pipe, "it is no regular file"),
        (f"torch_{ENDED}_1_1", lambda path: os.link(path, path.parent / "other"), "it has 2 names"),
    ],
    ids=["living", "psm", "cuda", "another name", "link", "folder", "pipe", "two names"],  # the same in each worker
)
def test_all_else_is_kept(
    folder: Path, proc: FakeProc, name: str, change: Callable[[Path], None] | None, reason: str
) -> None:
    path = make(folder, name)
    if change:
        change(path)
    plan = find(folder, proc)
    assert plan.orphans == []
    assert reasons(plan.kept)[name] == reason
    assert remove(plan, folder, proc).removed == []
    assert name in os.listdir(folder)


def test_a_file_that_may_be_in_flight_is_kept(folder: Path, proc: FakeProc) -> None:
    path = make(folder)
    plan = find(folder, proc, now=time.time())
    assert reasons(plan.kept) == {path.name: "it is less than 60 s old, and may be in flight"}


def test_a_file_of_another_user_is_kept_by_root_too(
    folder: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(folder)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert reasons(find(folder, proc).kept) == {path.name: f"it belongs to uid {uid}"}


def test_a_pid_that_was_given_out_again_only_changes_the_reason(
    folder: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(folder, f"torch_{os.getpid()}_1_1")
    monkeypatch.setattr(shared_memory, "_boot_time", lambda proc: LATER)
    assert reasons(find(folder, proc).kept) == {
        path.name: f"process {os.getpid()} is running; it started after the file was made, so the pid may be reused"
    }


def test_a_file_that_a_process_has_open_is_kept(folder: Path, proc: FakeProc) -> None:
    path = make(folder)
    for pid in (7, 5):
        (proc.add(pid) / "fd/3").symlink_to(path)
    plan = find(folder, proc)
    assert reasons(plan.kept) == {path.name: "it is open or mapped in process 5, 7"}


def test_a_process_that_cannot_be_looked_into_keeps_every_file(folder: Path, proc: FakeProc) -> None:
    path = make(folder)
    proc.add_opaque(5)
    plan = find(folder, proc)
    assert names(plan.orphans) == [path.name]
    assert plan.obstacles == ["process 5 (worker) cannot be looked into: Is a directory."]
    removal = remove(plan, folder, proc)
    assert removal.removed == []
    assert removal.obstacles == plan.obstacles
    assert path.exists()


def test_without_orphans_no_process_is_looked_into(folder: Path, proc: FakeProc) -> None:
    make(folder, "psm_0a1b2c3d")
    proc.add_opaque(5)
    assert find(folder, proc).obstacles == []


def test_a_missing_folder_is_an_error(tmp_path: Path, proc: FakeProc) -> None:
    with pytest.raises(FileNotFoundError):
        find(tmp_path / "missing", proc)


class TestBetweenTheListAndTheRemoval:
    """What other processes do meanwhile keeps the file."""

    def test_another_file_takes_the_name(self, folder: Path, proc: FakeProc) -> None:
        path = make(folder)
        plan = find(folder, proc)
        make(folder, "new").rename(path)
        assert reasons(remove(plan, folder, proc).kept) == {path.name: "it has changed since the list was made"}
        assert path.exists()

    def test_the_file_grows(self, folder: Path, proc: FakeProc) -> None:
        path = make(folder)
        plan = find(folder, proc)
        make(folder, size=5001)
        assert reasons(remove(plan, folder, proc).kept) == {path.name: "it has changed since the list was made"}
        assert path.exists()

    def test_a_link_takes_the_name(self, folder: Path, proc: FakeProc, tmp_path: Path) -> None:
        path = make(folder)
        plan = find(folder, proc)
        target = path.rename(tmp_path / "target")
        path.symlink_to(target)
        (reason,) = reasons(remove(plan, folder, proc).kept).values()
        assert reason.startswith("it cannot be opened")
        assert path.is_symlink()
        assert target.exists()

    def test_the_file_goes(self, folder: Path, proc: FakeProc) -> None:
        path = make(folder)
        plan = find(folder, proc)
        path.unlink()
        assert reasons(remove(plan, folder, proc).kept) == {path.name: "it cannot be opened: No such file or directory"}

    def test_the_pid_is_given_out_again(self, folder: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
        path = make(folder)
        plan = find(folder, proc)
        monkeypatch.setattr(shared_memory, "has_ended", lambda pid, proc: False)
        assert reasons(remove(plan, folder, proc).kept) == {path.name: f"process {ENDED} is running"}
        assert path.exists()

    def test_a_process_opens_the_file(self, folder: Path, proc: FakeProc) -> None:
        path = make(folder)
        plan = find(folder, proc)
        (proc.add(5) / "fd/3").symlink_to(path)
        assert reasons(remove(plan, folder, proc).kept) == {path.name: "it is open or mapped in process 5"}
        assert path.exists()

    def test_a_process_that_proc_does_not_show_opens_the_file(self, folder: Path, proc: FakeProc) -> None:
        path = make(folder)
        if not takes_leases(path):
            pytest.skip("no leases here")
        plan = find(folder, proc)
        with open(path, "rb"):
            removal = remove(plan, folder, proc)
        assert reasons(removal.kept) == {path.name: "a process that /proc does not show has it open"}
        assert path.exists()

    def test_the_file_is_replaced_at_the_last_moment(
        self, folder: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = make(folder)
        plan = find(folder, proc)

        def replace(descriptor: int) -> bool:
            make(folder, "new").rename(path)
            return False

        monkeypatch.setattr(file_holders, "is_open_elsewhere", replace)
        assert reasons(remove(plan, folder, proc).kept) == {path.name: "it has changed since the list was made"}
        assert path.exists()

    def test_a_process_that_cannot_be_looked_into_starts(
        self, folder: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(orphans, "BATCH", 2)
        for number in range(5):
            make(folder, f"torch_{ENDED}_1_{number}")
        plan = find(folder, proc)
        real, looks = file_holders.find, []

        def find_holders(*arguments: object) -> file_holders.Holders:
            looks.append(arguments)
            if len(looks) == 2:
                proc.add_opaque(5)
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(file_holders, "find", find_holders)
        removal = remove(plan, folder, proc)
        assert names(removal.removed) == [f"torch_{ENDED}_1_0", f"torch_{ENDED}_1_1"]
        assert len(removal.kept) == len(os.listdir(folder)) == 3
        assert len(removal.obstacles) == 1


def test_the_folder_stays_closed_afterwards(folder: Path, proc: FakeProc) -> None:
    make(folder)
    before = os.listdir("/proc/self/fd")
    remove(find(folder, proc), folder, proc)
    assert os.listdir("/proc/self/fd") == before


PIDS = st.sampled_from([ENDED, os.getpid(), os.getppid(), 1])
FORMS = st.sampled_from(
    ["torch_{}_1_1", "sgl_shm_mm_{}_0a1b2c3d", "sem.loky-{}-a", "pym-{}-a", "{}", "x_{}", "torch_{}"]
)
NAMES = st.one_of(ANY, st.builds(str.format, FORMS, PIDS))


@settings(max_examples=50)
@given(st.lists(NAMES, max_size=8, unique=True))
def test_whatever_the_names_only_those_with_the_pid_of_an_ended_process_go(given_names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        proc, folder = FakeProc(Path(base) / "proc"), Path(base) / "shm"
        folder.mkdir()
        for name in given_names:
            try:
                (folder / name).write_bytes(b"x")
            except (OSError, UnicodeError):  # `.`, too long, or no name of a file
                continue
        there = set(os.listdir(folder))
        removal = remove(find(folder, proc), folder, proc)
        left = set(os.listdir(folder))
    gone = {name for name in there if shared_memory.read_name(name)[1] == ENDED}
    assert there - left == gone == set(names(removal.removed))


def test_in_the_real_folder_a_file_of_this_test_is_removed(tmp_path: Path, proc: FakeProc) -> None:
    if not os.access(shared_memory.FOLDER, os.W_OK):
        pytest.skip("no shared memory here")
    path = shared_memory.FOLDER / f"torch_{ENDED}_{time.time_ns()}_0"
    path.write_bytes(b"x" * 5000)
    try:
        found = find(shared_memory.FOLDER, proc)
        plan = Plan([segment for segment in found.orphans if segment.name == path.name], [], [])
        removal = remove(plan, shared_memory.FOLDER, proc)
        assert names(removal.removed) == [path.name]
        assert removal.removed[0].nbytes == 8192
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
