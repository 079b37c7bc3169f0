"""The user's cache: nothing that another user can change is loaded from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from devguard import SimulationError
from devguard.errors import TracingError
from devguard.support import user_cache

OTHER = 12345  # the number of another user
IS_ROOT = os.geteuid() == 0
Fault = Callable[[Path], None]


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Give a path to another user; without root's permissions, `os.lstat` and scandir say so instead."""
    if IS_ROOT:
        return lambda path: os.chown(path, OTHER, OTHER, follow_symlinks=False)
    foreign: set[tuple[int, int]] = set()
    check = user_cache._check

    def check_as_if(path: str, found: os.stat_result, error: type, **options: object) -> None:
        if (found.st_dev, found.st_ino) in foreign:
            found = os.stat_result([*found[:4], OTHER, OTHER, *found[6:]])
        check(path, found, error, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(user_cache, "_check", check_as_if)
    return lambda path: foreign.add((os.lstat(path).st_dev, os.lstat(path).st_ino))


def open_to(mode: int) -> Fault:
    return lambda path: path.chmod(path.stat().st_mode | mode)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A cache: outer/link -> outer/real, real/cache/made with a file, bytecode, and a link to a file elsewhere."""
    made = tmp_path / "outer/real/cache/made"
    (made / "site/pkg/__pycache__").mkdir(parents=True, mode=0o700)
    (made / "site/pkg/__init__.py").write_text("")
    (made / "site/pkg/__pycache__/pkg.pyc").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/library.so").write_text("")
    (made / "site/library.so").symlink_to(tmp_path / "elsewhere/library.so")
    (tmp_path / "outer/link").symlink_to("real")
    return tmp_path / "outer/link/cache/made"


# Each place from which somebody could change what is loaded.
PLACES = (
    "outer",
    "outer/link",
    "outer/real",
    "outer/real/cache",
    "outer/real/cache/made",
    "outer/real/cache/made/site",
    "outer/real/cache/made/site/pkg",
    "outer/real/cache/made/site/pkg/__init__.py",
    "outer/real/cache/made/site/pkg/__pycache__",
    "outer/real/cache/made/site/pkg/__pycache__/pkg.pyc",
    "outer/real/cache/made/site/library.so",
    "elsewhere",
    "elsewhere/library.so",
)


def check_refused(tree: Path, place: Path, *words: str) -> None:
    with pytest.raises(SimulationError) as caught:
        user_cache.check_tree(tree, SimulationError)
    message = str(caught.value).replace("/link/", "/real/")
    for word in (f"{place} belongs to", "devguard loads nothing from it", "Set DEVGUARD_CACHE_DIR", *words):
        assert word in message, message


def test_what_only_this_user_can_change_is_accepted(tree: Path) -> None:
    assert set(user_cache.check_tree(tree, SimulationError)) == {
        "site/library.so",
        "site/pkg/__init__.py",
        "site/pkg/__pycache__/pkg.pyc",
    }


@pytest.mark.parametrize("place", PLACES)
def test_what_another_user_owns_is_refused(tree: Path, tmp_path: Path, place: str, give_away: Fault) -> None:
    give_away(tmp_path / place)
    check_refused(tree, tmp_path / place, f"uid {OTHER}", "the user of this process")


@pytest.mark.parametrize("mode", [0o020, 0o002, 0o022], ids=oct)
@pytest.mark.parametrize("place", [place for place in PLACES if not place.endswith(("link", "/site/library.so"))])
def test_what_others_can_write_to_is_refused(tree: Path, tmp_path: Path, place: str, mode: int) -> None:
    open_to(mode)(tmp_path / place)
    check_refused(tree, tmp_path / place, "others can write to it")


def test_a_folder_like_tmp_may_lie_on_the_way_but_is_no_cache(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").chmod(0o1777)
    user_cache.check_tree(tree, SimulationError)
    for place in ("outer/real/cache/made", "outer/real/cache/made/site"):
        (tmp_path / place).chmod(0o1777)
        check_refused(tree, tmp_path / place, "mode 1777", "outer/real/cache/made, which is then")
        (tmp_path / place).chmod(0o700)


def test_what_root_owns_is_accepted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not IS_ROOT:
        pytest.skip("only root can make files of root")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    user_cache.check_tree(tree, SimulationError)


def test_the_message_says_what_to_do_on_the_way_and_in_the_cache(tree: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.chmod(0o777)
    check_refused(tree, outer, f"or run `chmod go-w {outer}`")
    outer.chmod(0o755)
    site = tmp_path / "outer/real/cache/made/site"
    site.chmod(0o777)
    check_refused(tree, site, "outer/real/cache/made, which is then built again")


def test_missing_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        user_cache.make_folder(tmp_path / "a/b/c", SimulationError)
    finally:
        os.umask(before)
    assert {oct(each.stat().st_mode & 0o7777) for each in tmp_path.rglob("*")} == {"0o700"}
    user_cache.make_folder(tmp_path / "a/b/c", SimulationError)


def test_nothing_is_made_in_a_folder_of_another_user(tmp_path: Path, give_away: Fault) -> None:
    (tmp_path / "theirs").mkdir()
    give_away(tmp_path / "theirs")
    with pytest.raises(TracingError, match=f"{tmp_path}/theirs belongs to uid {OTHER}"):
        user_cache.make_folder(tmp_path / "theirs/a/b", TracingError)
    assert not list((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize("target", ["/nowhere/else", "loop", "../missing/.."])
def test_a_link_that_leads_nowhere_is_an_error_of_the_system(tmp_path: Path, target: str) -> None:
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(OSError, match=r"No such file|Too many levels"):
        user_cache.make_folder(tmp_path / "loop/cache", SimulationError)


def test_a_link_out_of_and_into_the_cache_is_followed_as_the_system_does(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "root").symlink_to("/")
    way = tmp_path / "a/up" / "root" / (tmp_path / "a/b").relative_to("/")
    user_cache.check_folder(way, SimulationError)
    (tmp_path / "a/b").chmod(0o770)
    with pytest.raises(SimulationError, match=f"{tmp_path}/a/b belongs to"):
        user_cache.check_folder(way, SimulationError)


def test_a_file_is_no_folder_and_a_folder_or_pipe_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe", 0o600)
    user_cache.check_file(tmp_path / "file", SimulationError)
    with pytest.raises(NotADirectoryError):
        user_cache.check_folder(tmp_path / "file", SimulationError)
    for wrong in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(SimulationError, match="is not a regular file"):
            user_cache.check_file(wrong, SimulationError)


def test_what_is_made_here_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "made/site").mkdir(parents=True)
        (tmp_path / "made/site/file").touch()
        (tmp_path / "made/link").symlink_to("site")
    finally:
        os.umask(before)
    (tmp_path / "made").chmod(0o700)
    user_cache.make_private(tmp_path / "made")
    user_cache.check_tree(tmp_path / "made", SimulationError)


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for named, base, found in (
        ("/named", "/base", "/named/x"),
        ("named", "/base", f"{tmp_path}/named/x"),
        ("", "/base/./", "/base/devguard/x"),
        ("", "relative", "/home/me/.cache/devguard/x"),
        ("", " ", "/home/me/.cache/devguard/x"),
    ):
        monkeypatch.setenv("DEVGUARD_CACHE_DIR", named)
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert str(user_cache.locate("x", SimulationError)) == found


def test_without_a_home_there_is_no_cache_in_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEVGUARD_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(SimulationError, match=re.escape("set DEVGUARD_CACHE_DIR")):
        user_cache.locate("x", SimulationError)
