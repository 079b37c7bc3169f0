"""The options of ``devguard doctor`` about shared memory, on a folder and processes of the test's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devguard import cli
from devguard.cli import shared_memory
from devguard.support import orphans
from tests.helpers.fakeproc import NEVER, FakeProc

ENDED = NEVER
STATED = ["doctor", "--reap", "--no-other-pid-namespace"]
HOSTILE = [os.fsdecode(name) for name in (b"\x1b[31m", b"a\nb", b"\xff", "\u202e".encode(), b"\x9b1m")]


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    proc = FakeProc(tmp_path / "proc")
    monkeypatch.setattr(shared_memory, "PROC", proc.path)
    return proc


@pytest.fixture
def folder(tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(shared_memory, "FOLDER", path)
    monkeypatch.setattr(orphans, "MIN_AGE_S", 0.0)
    return path


def orphan(folder: Path, number: int = 0, size: int = 5000) -> Path:
    path = folder / f"torch_{ENDED}_1_{number}"
    path.write_bytes(b"x" * size)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def test_reap_alone_lists_removes_nothing_and_explains_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = orphan(folder)
    (folder / "psm_0a1b2c3d").write_bytes(b"x")
    (folder / f"torch_{os.getpid()}_1_1").write_bytes(b"x")
    status, out, err = run(capsys, "doctor", "--reap")
    assert status == 2
    assert sorted(os.listdir(folder)) == sorted([path.name, "psm_0a1b2c3d", f"torch_{os.getpid()}_1_1"])
    assert out.startswith(f"orphans in {folder}: 1 entry, ")
    assert f"process {ENDED} has ended: {path.name}\n" in out
    assert f"kept, because process {os.getpid()} is running: torch_{os.getpid()}_1_1\n" in out
    assert "also kept: 1 entry (devguard doctor --shared-memory" in out
    assert err.endswith("devguard doctor --reap --no-other-pid-namespace\n")


def test_with_the_statement_the_orphans_are_removed_and_named_with_their_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [orphan(folder, number, size=8192) for number in range(3)]
    (folder / "psm_0a1b2c3d").write_bytes(b"x")
    status, out, err = run(capsys, *STATED)
    assert (status, err) == (0, "")
    assert os.listdir(folder) == ["psm_0a1b2c3d"]
    listed, removed = out.index("has ended: "), out.index("removed 8.0 KiB: ")
    assert listed < removed  # a list comes first
    for path in paths:
        assert f"removed 8.0 KiB: {path.name}\n" in out
    assert out.endswith("removed 3 entries of 3, 24.0 KiB\n")


def test_the_statement_alone_is_bad_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "doctor", "--no-other-pid-namespace")
    assert (status, err) == (2, "devguard doctor: --no-other-pid-namespace only goes with --reap.\n")
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--reap", "--shared-memory"])


def test_a_process_that_cannot_be_looked_into_keeps_all_and_is_named(
    folder: Path, proc: FakeProc, capsys: pytest.CaptureFixture[str]
) -> None:
    path = orphan(folder)
    (proc.add_opaque(5) / "comm").write_text("\x1b[2J\n")
    for pid in range(6, 15):
        proc.add_opaque(pid)
    status, out, _ = run(capsys, *STATED)
    assert status == 1
    assert path.exists()
    assert "No file can be removed now" in out
    assert "  process 5 (\\x1b[2J) cannot be looked into: Is a directory.\n" in out
    assert "  and 5 more\n" in out
    assert "CAP_SYS_PTRACE" in out
    assert out.endswith("removed 0 entries of 1, 0 B\n")


def test_a_file_that_cannot_be_removed_is_named_and_the_status_is_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = orphan(folder)

    def unlink(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "unlink", unlink)
    status, out, _ = run(capsys, *STATED)
    assert status == 1
    assert f"kept, because it cannot be removed: Read-only file system: {path.name}\n" in out


def test_as_json_the_plan_and_what_was_done_are_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = orphan(folder, size=8192)
    (folder / "psm_0a1b2c3d").write_bytes(b"x")
    status, out, err = run(capsys, "doctor", "--reap", "--json")
    found = json.loads(out)
    assert (status, found["status"], err) == (2, 2, "")
    assert [row["name"] for row in found["orphans"]] == [path.name]
    assert found["kept"] == [{"name": "psm_0a1b2c3d", "reason": "its name carries no pid"}]
    assert (found["removed"], found["removed_bytes"]) == ([], 0)
    status, out, _ = run(capsys, *STATED, "--json")
    found = json.loads(out)
    assert (status, found["status"]) == (0, 0)
    assert (found["removed"], found["removed_bytes"]) == ([{"name": path.name, "bytes": 8192}], 8192)


def test_the_list_holds_all_with_what_is_known(
    folder: Path, proc: FakeProc, capsys: pytest.CaptureFixture[str]
) -> None:
    path = orphan(folder, size=8192)
    (proc.add(5) / "fd/3").symlink_to(path)
    (folder / "nccl-abcdef").write_bytes(b"x")
    (folder / "what").mkdir()
    status, out, _ = run(capsys, "doctor", "--shared-memory")
    assert status == 0
    assert f"   8.0 KiB  0 s old, torch, process {ENDED} has ended, open in process 5: {path.name}\n" in out
    assert "0 s old, NCCL, not open: nccl-abcdef\n" in out
    assert "0 s old, maker unknown, a folder, not open: what\n" in out
    assert f"3 entries in {folder}, " in out
    assert "may still be in use" in out
    found = json.loads(run(capsys, "doctor", "--shared-memory", "--json")[1])
    assert {row["name"]: row["holders"] for row in found["entries"]}[path.name] == [5]
    assert found["obstacles"] == []


def test_the_doctor_names_the_largest_and_the_total(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(13):
        orphan(folder, number, size=4096 * (number + 1))
    shared_memory.show_summary(json.loads(json.dumps(shared_memory.examine())))
    first, *rows, more, left = capsys.readouterr().out.splitlines()
    assert first.startswith(f"shared memory: 13 entries in {folder}, 364.0 KiB; ")
    assert [row.rpartition("_")[2] for row in rows] == [str(number) for number in range(12, 2, -1)]
    assert more == "  and 3 more: devguard doctor --shared-memory"
    assert left == "  13 entries, 364.0 KiB, left by processes that have ended: devguard doctor --reap"


def test_the_doctor_does_not_look_into_processes(folder: Path, proc: FakeProc) -> None:
    orphan(folder)
    proc.add_opaque(5)
    (proc.path / "self").unlink()
    assert shared_memory.examine()["left_entries"] == 1  # type: ignore[index]


@pytest.mark.parametrize("words", [["--shared-memory"], ["--reap", "--no-other-pid-namespace"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_without_the_folder_nothing_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], form: list[str]
) -> None:
    folder.rmdir()
    assert run(capsys, "doctor", *words, *form)[0] == 0
    assert shared_memory.examine() is None
    shared_memory.show_summary(None)
    assert capsys.readouterr().out == f"shared memory: there is no {folder} here\n"


def test_a_folder_that_cannot_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shared_memory.shared_memory, "scan", scan)
    shared_memory.show_summary(shared_memory.examine())
    assert capsys.readouterr().out == f"shared memory: {folder} cannot be read: Permission denied\n"
    assert run(capsys, *STATED)[0] == 1


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(HOSTILE), unique=True))
def test_names_change_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")
    shared_memory.show_summary(shared_memory.examine())
    for words in (["--shared-memory"], ["--reap"], ["--shared-memory", "--json"], ["--reap", "--json"]):
        cli.main(["doctor", *words])
    text = "".join(capsys.readouterr())
    assert text.replace("\n", "").isprintable()
    assert "\na\n" not in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86400 * 3, "3 d")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert shared_memory._format_age(seconds) == text
