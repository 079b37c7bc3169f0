"""Folders in the cache: complete or not there."""

from __future__ import annotations

import os
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


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return cached.get(tmp_path / "cache", "made", fill, QUIET)


def test_folders_are_made_for_this_user_alone(made: Path) -> None:
    assert [oct(each.stat().st_mode & 0o777) for each in (made.parent, made)] == ["0o700", "0o700"]


@pytest.mark.parametrize("name", [".", "library.so", "manifest.json", "__pycache__", "__pycache__/late.pyc"])
def test_a_folder_that_vouches_for_itself_is_refused_if_others_can_change_it(made: Path, name: str) -> None:
    (made / "__pycache__").mkdir()
    (made / "__pycache__/late.pyc").write_bytes(b"")
    assert cached.whole(made)
    (made / name).chmod(0o777)
    calls: list[Path] = []
    with pytest.raises(SimulationError, match=r"others can write to it \(mode 0777\)"):
        cached.get(made.parent, "made", counted(calls), QUIET)
    assert calls == []


def test_nothing_is_built_where_others_can_write(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    calls: list[Path] = []
    with pytest.raises(SimulationError, match=f"{shared} belongs to .* others can write to it"):
        cached.get(shared / "simgpu", "made", counted(calls), QUIET)
    assert (calls, list(shared.iterdir())) == ([], [])


@pytest.mark.parametrize("name", ["sitecustomize.py", "site/torch.pth", "library.so.1"])
def test_a_folder_with_a_file_that_its_manifest_lacks_is_rebuilt(made: Path, name: str) -> None:
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("")
    assert not cached.whole(made)
    cached.get(made.parent, "made", fill, QUIET)
    assert sorted(path.name for path in made.iterdir()) == ["library.so", "manifest.json"]


NONSENSE = ("", "[]", "{}", "null", '{"format": 1, "files": []}', '{"format": 1}', "[" * 100_000, "\0")


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_a_manifest_that_makes_no_sense_means_damage(made: Path, text: str) -> None:
    (made / "manifest.json").write_text(text)
    assert not cached.whole(made)


@pytest.mark.parametrize("umask", [0, 0o002])
def test_what_a_lax_umask_opens_is_closed(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = cached.get(tmp_path / "cache", "made", fill, QUIET)
    finally:
        os.umask(before)
    assert cached.whole(folder)


@pytest.mark.parametrize("target", ["/nowhere", "made.lock"])
def test_a_link_or_file_in_the_place_of_a_folder_is_replaced(tmp_path: Path, target: str) -> None:
    (tmp_path / "made").symlink_to(target)
    folder = cached.get(tmp_path, "made", fill, QUIET)
    assert folder.is_dir()
    assert not folder.is_symlink()
