"""Counting copies in a log of the simulation."""

from __future__ import annotations

from pathlib import Path

from devguard.demo import copies

LOG = """\
12 12 - cuInit visible=2
12 12 0 ctx_create by=cudaSetDevice
12 12 0 memcpy dst=0 src=-1 bytes=64
12 13 0 memcpy dst=-1 src=0 bytes=100
15 15 1 memcpyPeer dst=1 src=0 bytes=7
15 15 1 memcpy2D dst=1 src=-1 bytes=3
15 15 1 memcpy dst=-1 src=-1 bytes=5
15 15 1 memset dst=1 bytes=9
"""


def test_copies_are_sorted_by_their_direction(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert copies.read(tmp_path / "log") == copies.Copies(down=[100], up=[64, 3], across=[7])


def test_only_the_copies_between_two_positions_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert copies.size(log) == 0
    assert copies.read(log) == copies.Copies([], [], [])
    log.write_text(LOG)
    start = copies.size(log)
    with log.open("a") as file:
        file.write("12 12 0 memcpy dst=-1 src=0 bytes=11\n")
    end = copies.size(log)
    with log.open("a") as file:
        file.write("12 12 0 memcpy dst=-1 src=0 bytes=22\n")
    assert copies.read(log, start, end).down == [11]
    assert copies.read(log, start).down == [11, 22]
