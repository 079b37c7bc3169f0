"""Folders that are made for this user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from unittest import mock

import pytest

from devguard.support import private_folders


def modes(*folders: Path) -> list[int]:
    return [stat.S_IMODE(folder.stat().st_mode) for folder in folders]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_every_missing_folder_is_made_for_this_user_alone(tmp_path: Path, umask: int) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    before = os.umask(umask)
    try:
        private_folders.make(there / "a" / "b")
        private_folders.make(there / "a" / "b")
    finally:
        os.umask(before)
    assert modes(there, there / "a", there / "a" / "b") == [0o755, 0o700, 0o700]


def test_a_folder_that_another_process_makes_meanwhile_is_used(tmp_path: Path) -> None:
    make = os.mkdir

    def late(path: Path, mode: int) -> None:
        make(path, mode)
        raise FileExistsError

    with mock.patch.object(os, "mkdir", late):
        private_folders.make(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_on_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        private_folders.make(tmp_path / "file" / "a")
