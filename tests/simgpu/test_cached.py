"""Folders in the cache: complete or not there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from devguard import SimulationError
from devguard.simgpu import cached
from devguard.simgpu.progress import Reporter

QUIET = Reporter(enabled=False)


def fill(folder: Path) -> None:
    (folder / "library.so").write_bytes(b"1234")


def counted(calls: list[Path]) -> Callable[[Path], None]:
    def fill_and_count(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    return fill_and_count


def test_a_folder_is_filled_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        assert cached.get(tmp_path, "made", counted(calls), QUIET) == tmp_path / "made"
    assert len(calls) == 1
    assert (tmp_path / "made/library.so").read_bytes() == b"1234"


def test_a_fill_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise SimulationError("the download was interrupted")

    with pytest.raises(SimulationError, match="interrupted"):
        cached.get(tmp_path, "made", fail, QUIET)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_damaged_folder_is_replaced(tmp_path: Path) -> None:
    folder = cached.get(tmp_path, "made", fill, QUIET)
    (folder / "library.so").write_bytes(b"12")
    assert not cached.whole(folder)
    calls: list[Path] = []
    cached.get(tmp_path, "made", counted(calls), QUIET)
    assert len(calls) == 1
    assert cached.whole(folder)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["made"]


def test_bytecode_that_python_adds_later_is_not_part_of_a_folder(tmp_path: Path) -> None:
    folder = cached.get(tmp_path, "made", fill, QUIET)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/late.pyc").write_bytes(b"")
    assert cached.whole(folder)
    assert sorted(name for name, _ in cached.files(folder)) == ["library.so", "manifest.json"]


def test_several_builders_fill_a_folder_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    barrier = threading.Barrier(4)

    def build() -> None:
        barrier.wait()
        cached.get(tmp_path, "made", counted(calls), QUIET)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_an_unwritable_folder_is_an_error_that_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SimulationError, match="set DEVGUARD_CACHE_DIR to a writable folder"):
        cached.get(tmp_path / "file", "made", fill, QUIET)


def test_a_missing_package_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(SimulationError, match=r"need no_such_package.*torch-devguard\[sim\]"):
        cached.extra("no_such_package")
