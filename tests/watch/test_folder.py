"""A log folder that is read while its processes write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from devguard import ConfigError
from devguard.logs import lines as log_lines
from devguard.reporting import sampler
from devguard.reporting.log_file import COUNTS
from devguard.support import process_identity
from devguard.watch.folder import Folder, touch
from tests.logs.test_reader import row

STATE = {"process_owner": "cuda:1", "owned": ["cuda:1"], "contexts": ["cuda:1"]}


class Writer:
    """Writes a log as log_file.py does."""

    def __init__(self, folder: Path, pid: int = 1, **first: Any) -> None:
        self.path = folder / f"{pid}.jsonl"
        self.path.write_bytes(b"")
        self.line({"process": {"pid": pid, "host": "here", "command": "serve", "time": 5.0, **first}})

    def line(self, line: dict[str, Any]) -> None:
        self.add(json.dumps(line).encode() + b"\n")

    def add(self, data: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(data)
        os.utime(self.path, ns=(time.time_ns(), time.time_ns()))

    def sample(self, at: float, reserved: int, **more: Any) -> None:
        self.line({"now": {"memory": {"cuda:1": [1, reserved, 3]}, "strays": 0, **more}, "time": at})

    def row(self, number: int, count: int) -> None:
        found = {**row(number), "time": 7.0}
        del found["count"], found["bytes"]
        self.add(json.dumps(found).encode()[:-1] + b", " + COUNTS % (count, 8 * count))

    def grow(self, number: int, count: int) -> None:
        data = self.path.read_bytes()
        start = data.index(b'{"stray": %d' % number)
        at = data.index(b'"count"', start)
        counts = COUNTS % (count, 8 * count)
        self.path.write_bytes(data[:at] + counts + data[at + len(counts) :])


def test_each_look_adds_what_was_written_since(tmp_path: Path) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    (journal,) = folder.update()
    assert (journal.process.pid, journal.states, journal.samples, journal.sample) == (1, [], [], None)
    writer.line({"state": STATE, "time": 6.0})
    writer.sample(7.0, 2)
    (same,) = folder.update()
    assert same is journal
    writer.sample(8.0, 9, arenas=[{"in_use": 4}, "junk"])
    folder.update()
    assert [(state.time, state.owner, state.contexts) for state in journal.states] == [(6.0, "cuda:1", ("cuda:1",))]
    assert [(sample.time, sample.memory) for sample in journal.samples] == [
        (7.0, {"cuda:1": (1, 2, 3)}),
        (8.0, {"cuda:1": (1, 9, 3)}),
    ]
    assert journal.sample is journal.samples[1]
    assert journal.sample.arenas == ({"in_use": 4},)
    assert journal.damage.places() == []


def test_counts_that_change_in_place_are_read_again(tmp_path: Path) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    writer.row(0, 1)
    writer.row(1, 1)
    (journal,) = folder.update()
    assert journal.times == {0: 7.0, 1: 7.0}
    for count in (2, 30):
        writer.grow(0, count)
        folder.update()
        assert [(site.count, site.bytes) for site in journal.rows.values()] == [(count, 8 * count), (1, 8)]


def test_a_sample_that_is_overwritten_is_read_again(tmp_path: Path) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    writer.sample(7.0, 2)
    (journal,) = folder.update()
    for at, number in ((8.0, 3), (9.0, 4)):
        data = writer.path.read_bytes()
        writer.path.write_bytes(
            data.replace(b'"time": %.1f}' % (at - 1), b'"time": %.1f}' % at).replace(
                b" %d, 3]" % (number - 1), b" %d, 3]" % number
            )
        )
        os.utime(writer.path, ns=(time.time_ns(), time.time_ns()))
        folder.update()
        os.utime(writer.path, ns=(time.time_ns(), time.time_ns()))
        folder.update()  # nothing new
    assert [(sample.time, sample.memory["cuda:1"][1]) for sample in journal.samples] == [(7.0, 2), (8.0, 3), (9.0, 4)]


@pytest.mark.parametrize("is_new", [False, True])
def test_a_file_in_the_place_of_another_is_read_from_its_beginning(tmp_path: Path, is_new: bool) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    writer.sample(7.0, 2)
    writer.row(0, 1)
    folder.update()
    if is_new:
        writer.path.rename(tmp_path / "old")  # so that the new file has another number
    other = Writer(tmp_path, parent=3)
    if is_new:
        other.path.rename(tmp_path / "1.jsonl")
        other.add(b'{"alert": "a"}\n' * 40)
    (journal,) = folder.update()
    assert (journal.process.parent, journal.samples, journal.rows) == (3, [], {})
    other.sample(8.0, 2)
    (same,) = folder.update()
    assert same is journal
    assert len(journal.samples) == 1


def test_a_file_that_cannot_be_read_for_a_while_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    (journal,) = folder.update()
    writer.sample(7.0, 2)
    with monkeypatch.context() as busy:

        def fail(file: Path) -> None:
            raise OSError(24, "Too many open files")

        busy.setattr(log_lines, "_open", fail)
        folder.update()
    assert (journal.samples, journal.damage.places()) == ([], ["1.jsonl: Too many open files"])
    folder.update()  # the file has not changed since
    assert (len(journal.samples), journal.damage.places()) == (1, [])


def test_a_line_that_is_being_written_is_read_when_it_is_complete(tmp_path: Path) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    line = json.dumps({"state": STATE, "time": 6.0}).encode() + b"\n"
    writer.add(line[:20])
    (journal,) = folder.update()
    assert journal.states == []
    writer.add(line[20:])
    folder.update()
    assert len(journal.states) == 1
    assert journal.damage.places() == []


@pytest.mark.parametrize(
    "line",
    [
        b"junk",
        b'{"now": 3}',
        b'{"now": {"memory": {"cuda:1": [1, 2]}, "strays": 0}, "time": 1}',
        b'{"now": {"memory": {"cuda:1": [1, 2, -3]}, "strays": 0}, "time": 1}',
        b'{"now": {"memory": [], "strays": 0}, "time": 1}',
        b'{"now": {"memory": {}, "strays": 0}, "time": NaN}',
        b'{"now": {"memory": {}, "strays": 0}}',
        b'{"state": {"process_owner": 1, "owned": [], "contexts": []}, "time": 1}',
        b'{"stray": 0}',
    ],
)
def test_a_line_that_is_not_devguards_is_named_and_the_next_one_is_read(tmp_path: Path, line: bytes) -> None:
    writer, folder = Writer(tmp_path), Folder(tmp_path)
    writer.add(line + b"\n")
    writer.sample(7.0, 2)
    (journal,) = folder.update()
    assert journal.damage.places() == ["1.jsonl:2"]
    assert len(journal.samples) == 1


def test_new_processes_appear_in_the_order_of_their_starts(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.update() == []
    Writer(tmp_path, 2, time=9.0)
    assert [journal.process.pid for journal in folder.update()] == [2]
    Writer(tmp_path, 1, time=8.0)
    assert [journal.process.pid for journal in folder.update()] == [1, 2]
    (tmp_path / "1.jsonl").unlink()
    assert [journal.process.pid for journal in folder.update()] == [1, 2]


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        Folder(tmp_path / "none").update()


def test_a_process_runs_until_the_kernel_says_that_it_has_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    space = process_identity.pid_space()
    Writer(tmp_path, child.pid, started=process_identity.started(child.pid), pid_space=space)
    folder = Folder(tmp_path)
    (journal,) = folder.update()
    assert journal.is_running()
    child.communicate(b"\n")
    folder.update()
    assert not journal.is_running()
    assert journal.process.end == "lost"


def test_a_process_of_another_container_has_no_number_here(tmp_path: Path) -> None:
    own = os.getpid()
    Writer(tmp_path, own, started=process_identity.started(own), pid_space="elsewhere")
    (journal,) = Folder(tmp_path).update()
    assert (journal.pid, journal.is_running()) == (None, False)
    journal.local_pid = own
    assert (journal.pid, journal.is_running()) == (own, True)


def test_to_touch_a_folder_asks_its_processes_for_samples(tmp_path: Path) -> None:
    written: list[Any] = []
    watching = sampler.Sampler(tmp_path, written.append, lambda: None)
    watching.stop()
    assert not watching.is_watched()
    assert touch(tmp_path)
    assert watching.is_watched()
    assert not touch(tmp_path / "none")
    (tmp_path / sampler.WATCHED).unlink()
    (tmp_path / sampler.WATCHED).symlink_to(tmp_path / "elsewhere")
    assert not touch(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
