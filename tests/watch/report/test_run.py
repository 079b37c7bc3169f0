"""One run, as its log folder shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from devguard.errors import ConfigError
from devguard.logs import reader as log_reader
from devguard.watch.report.run import DROPPED, read
from tests.helpers.journals import Log, make_run


def test_a_run_has_what_devguard_log_finds(tmp_path: Path) -> None:
    make_run(tmp_path)
    processes, merged, _ = log_reader.read(tmp_path)
    found = read(tmp_path)
    assert [track.journal.process for track in found.tracks] == sorted(processes, key=lambda process: process.time)
    assert sum(site.count for site in found.sites) == sum(site.count for site in merged)
    assert sum(site.bytes for site in found.sites) == sum(site.bytes for site in merged)


def test_damaged_lines_are_those_that_devguard_log_names(tmp_path: Path) -> None:
    log = make_run(tmp_path) / "here-10-1.jsonl"
    with open(log, "ab") as file:
        file.write(
            b"\xff\xfe\n[1]\n" + b'{"now": {"memory": {"cuda:0": [1]}, "strays": 0}, "time": 1}\n' + b'{"state": '
        )
    (tmp_path / "nothing.jsonl").write_text("nothing\n")
    found = read(tmp_path)
    assert len(found.damaged) == 5
    # `devguard log` does not read the numbers of samples, and names all the others.
    assert set(log_reader.read(tmp_path)[2]) == {place for place in found.damaged if not place.endswith(":8")}
    assert len(found.tracks) == 4


@pytest.mark.parametrize(("make", "message"), [(False, "is not a folder"), (True, "holds no log")])
def test_a_folder_without_a_log_is_an_error_with_what_to_do(tmp_path: Path, make: bool, message: str) -> None:
    folder = tmp_path / "logs"
    if make:
        folder.mkdir()
    with pytest.raises(ConfigError, match=message) as raised:
        read(folder)
    assert re.search("devguard run --log", str(raised.value))


def test_the_environment_of_each_process_is_that_of_its_first_line(tmp_path: Path) -> None:
    log = Log(tmp_path, 1, torch="2.13.0", CUDA_VISIBLE_DEVICES="3,1", LOCAL_RANK=7, python="3.12.1")
    log.state(1.0, "cuda:0", [])
    log.end(2.0, strays_not_kept=12)
    (known,) = read(tmp_path).environments
    assert known == {
        "devguard": "0.1.0",
        "torch": "2.13.0",
        "python": "3.12.1",
        "CUDA_VISIBLE_DEVICES": "3,1",
        DROPPED: "12",
    }


def test_processes_stand_in_the_order_of_their_gpus(tmp_path: Path) -> None:
    for pid, owner in ((1, "cuda:3"), (2, "cuda:0"), (3, "cpu"), (4, "cuda:1")):
        Log(tmp_path, pid, pid).state(5.0, owner, [] if owner == "cpu" else [owner, "cuda:0"])
    found = read(tmp_path)
    assert [found.owner(place) for place in found.order()] == ["cpu", "cuda:0", "cuda:1", "cuda:3"]
    assert [column.label for column in found.columns()] == ["0", "1", "3"]
    assert found.title(0) == "serve.py (pid 1)"
    assert found.ownerless == []
