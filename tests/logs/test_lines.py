"""The lines of the files of a log folder, which may hold anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from devguard import ConfigError
from devguard.logs import lines as log_lines
from devguard.logs.lines import Damage


def read(file: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    damage = Damage(file.name)
    return list(log_lines.read_objects(file, damage)), damage.places()


def test_objects_are_read_with_the_numbers_of_their_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"a": 1}\n\n  \r\n{"b": "\xff"}\n{"c": [NaN]}\n[]\n7\n{"d": 2}')
    assert read(tmp_path / "log") == ([(1, {"a": 1}), (4, {"b": "�"}), (8, {"d": 2})], ["log:5", "log:6", "log:7"])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\0" * 1000,
        b"\xff\xfe{\x00}\x00",
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'{"a": -Infinity}',
        b'{"a": 1} {"b": 1}',
        b"x" * (30 << 20),
        b'{"a": "' + b"x" * (30 << 20) + b'"}',
    ],
    ids=["brackets", "objects", "NUL", "UTF-16", "digits", "infinity", "two", "30 MB", "30 MB of JSON"],
)
def test_a_line_that_is_no_object_is_damaged_and_the_next_one_is_read(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log").write_bytes(line + b'\n{"a": 1}\n' + line)
    assert read(tmp_path / "log") == ([(2, {"a": 1})], ["log:1", "log:3"])


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x\n" * 1000)
    objects, places = read(tmp_path / "log")
    assert objects == []
    assert places == [*(f"log:{number}" for number in range(1, 21)), "log: 980 more lines"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    for name in ("pipe", "loop", "device", "link"):
        assert read(tmp_path / name) == ([], [f"{name}: not a regular file, so it is not read"])
    assert read(tmp_path / "none") == ([], ["none: No such file or directory"])


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text('{"a": 1}')

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert read(tmp_path / "file") == ([], ["file: Permission denied"])


def test_files_are_listed_by_their_ending_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "folder.x").mkdir()
    for name in (b"a.x", b"\xff\xfe.x", b"\x1b[31m.x", b"new\nline.x", b"other"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert log_lines.list_files(tmp_path, ".x") == ["\x1b[31m.x", "a.x", "new\nline.x", "\udcff\udcfe.x"]


@pytest.mark.parametrize("name", ["none", "file", "loop", "a\0b", "x" * 5000])
def test_what_is_no_folder_is_an_error_of_the_user(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"is not a folder|cannot be read"):
        log_lines.list_files(tmp_path / name, ".x")


def test_a_line_without_an_end_is_not_read_to_the_end_of_the_file(tmp_path: Path) -> None:
    for name, start in (("first", b""), ("second", b'{"a": 1}\n')):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(200 << 30)  # a sparse file: it takes no space on the disk
    cut = "only its beginning is read, because line {} does not end"
    assert read(tmp_path / "first") == ([], ["first:1", "first: " + cut.format(1)])
    assert read(tmp_path / "second") == ([(1, {"a": 1})], ["second:2", "second: " + cut.format(2)])


def test_of_a_file_of_many_lines_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_bytes(b'{"a": 1}\n' * 10)
    cut = ["log: only its beginning is read, up to line 4: the file is too long for a log"]
    every = [(number, {"a": 1}) for number in range(1, 11)]
    for name, most in (("MOST_LINES", 4), ("MOST_READ", 40)):
        with monkeypatch.context() as patch:
            patch.setattr(log_lines, name, most)
            assert read(tmp_path / "log") == (every[:4], cut)
    monkeypatch.setattr(log_lines, "MOST_LINES", 10)
    monkeypatch.setattr(log_lines, "MOST_READ", 90)
    assert read(tmp_path / "log") == (every, [])


@pytest.mark.parametrize("part", [b"\n", b"x\n", b"{}\n", b"\0", b"[]\r\n", b'{"a": [[[]]]}\n'])
def test_a_file_without_end_is_cut_whatever_it_holds(tmp_path: Path, part: bytes) -> None:
    (tmp_path / "log").write_bytes(part * ((140 << 20) // len(part)))
    _, places = read(tmp_path / "log")
    assert "only its beginning is read" in places[-1]
