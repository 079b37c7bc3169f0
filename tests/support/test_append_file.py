"""A file that is appended to although the program closes or reuses descriptors."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from devguard.support.append_file import AppendFile


def test_lines_are_appended_to_a_new_file_of_this_user_alone(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "new" / "a.jsonl")
    file.write(b"1\n")
    file.close()
    file.write(b"2\n")
    file.close()
    assert file.path.read_bytes() == b"1\n2\n"
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        AppendFile(file.path)


@pytest.mark.parametrize("closes", [True, False])
def test_a_reused_descriptor_is_neither_written_nor_closed(tmp_path: Path, closes: bool) -> None:
    file = AppendFile(tmp_path / "a")
    number = file._descriptor
    own = os.open(tmp_path / "own", os.O_RDWR | os.O_CREAT)
    os.dup2(own, number)
    try:
        if closes:
            file.close()
        file.write(b"1")
        file.close()
        os.fstat(number)
        assert os.fstat(own).st_size == 0
        assert (tmp_path / "a").read_bytes() == b"1"
    finally:
        os.close(own)
        os.close(number)


def test_a_file_that_was_removed_is_not_made_again_elsewhere(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    os.close(file._descriptor)
    file.path.unlink()
    file.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        file.write(b"1")
    assert not (tmp_path / "elsewhere").exists()


def test_every_folder_that_is_made_is_of_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o755)
    (tmp_path / "own").chmod(0o755)
    before = os.umask(0)
    try:
        file = AppendFile(tmp_path / "own" / "a" / "b" / "c" / "log")
    finally:
        os.umask(before)
    file.close()
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in list(file.path.parents)[:4]]
    assert modes == [0o700, 0o700, 0o700, 0o755]


REPLACEMENTS = {
    "a pipe": os.mkfifo,
    "a pipe with a reader": lambda path: (os.mkfifo(path), os.open(path, os.O_RDONLY | os.O_NONBLOCK)),
    "a folder": os.mkdir,
    "another file": lambda path: path.write_bytes(b"theirs"),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_a_file_that_was_replaced_is_not_written_and_nothing_waits(what: str, tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    offset = file.write(b"1234\n")
    assert offset == 0
    for descriptor in (file._descriptor, file._second):
        if descriptor >= 0:
            os.close(descriptor)
    file.path.rename(tmp_path / "moved")
    REPLACEMENTS[what](file.path)  # type: ignore[operator]
    signal.alarm(30)  # SIGALRM ends a process that waits for the reader of a pipe
    try:
        with pytest.raises(OSError):  # noqa: PT011 - the text depends on what is there
            file.write(b"1")
        with pytest.raises(OSError):  # noqa: PT011 - the text depends on what is there
            file.overwrite(0, b"1")
    finally:
        signal.alarm(0)
    assert (tmp_path / "moved").read_bytes() == b"1234\n"
    assert what != "another file" or file.path.read_bytes() == b"theirs"


def test_written_bytes_are_overwritten_in_place_while_the_file_grows(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    first, second = file.write(b"1111\n"), file.write(b"2222\n")
    assert (first, second) == (0, 5)
    assert file.overwrite(6, b"xx")
    file.write(b"3\n")
    file.close()
    assert file.overwrite(0, b"y")  # after the program has closed both descriptors
    assert file.path.read_bytes() == b"y111\n2xx2\n3\n"


def test_an_overwrite_goes_neither_to_a_reused_descriptor_nor_beyond_a_truncated_file(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "a")
    file.write(b"1111\n")
    assert file.overwrite(0, b"2")
    own = os.open(tmp_path / "own", os.O_RDWR | os.O_CREAT)
    os.dup2(own, file._second)
    os.dup2(own, file._descriptor)
    assert file.overwrite(1, b"2")
    assert os.fstat(own).st_size == 0
    os.truncate(file.path, 2)
    assert not file.overwrite(1, b"33")
    assert file.path.read_bytes() == b"22"


def test_the_offset_is_unknown_where_another_writer_came_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "a")
    write = os.write

    def both(descriptor: int, data: bytes) -> int:
        with file.path.open("ab") as other:
            other.write(b"other\n")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", both)
    assert file.write(b"1\n") is None
    monkeypatch.undo()
    assert file.write(b"2\n") == 8
