"""A file that is appended to although the program closes or reuses descriptors."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from devguard.reporting.append_file import AppendFile


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
