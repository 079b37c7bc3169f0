"""Which processes have a file open or mapped, and when the answer is not complete."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devguard.support import file_holders, shared_memory
from tests.helpers.fakeproc import FakeProc, takes_leases

PROC = Path("/proc")
ROOT = Path(__file__).parents[2]

HOLD = """
import mmap, os, sys
path, how = sys.argv[1:]
mode = os.O_RDONLY if "read" in how else os.O_RDWR
fd = os.open(path, mode)
if "map" in how:
    held = mmap.mmap(fd, 0, prot=mmap.PROT_READ if "read" in how else mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, how: str) -> Iterator[int]:
    """Run a process that has the file open or mapped; yield its pid."""
    command = [sys.executable, "-S", "-c", HOLD, str(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shm" / "torch_1_1_1"
    path.parent.mkdir()
    path.write_bytes(b"x" * 4096)
    return path


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


def identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def find(path: Path, proc: Path = PROC) -> file_holders.Holders:
    return file_holders.find({identity(path): path.name}, path.parent, proc)


@pytest.mark.parametrize("how", ["open", "open to read", "map", "map to read"])
def test_a_process_that_has_the_file_open_or_mapped_is_found(file: Path, how: str) -> None:
    with holder(file, how) as pid:
        assert find(file).pids == {identity(file): [pid]}
    assert find(file).pids == {}


def test_a_file_is_found_under_its_new_name(file: Path) -> None:
    with holder(file, "open") as opened, holder(file, "map") as mapped:
        moved = file.rename(file.with_name("sgl_shm_mm_1_00000000"))
        assert find(moved).pids == {identity(moved): sorted([opened, mapped])}


def test_a_file_of_the_same_name_in_another_folder_does_not_count(file: Path, tmp_path: Path) -> None:
    other = tmp_path / file.name
    other.write_bytes(b"x")
    with holder(other, "open"), holder(other, "map"):
        assert find(file).pids == {}


def test_this_process_counts(file: Path) -> None:
    with open(file, "rb"):
        assert find(file).pids == {identity(file): [os.getpid()]}


def test_a_process_with_only_a_thread_left_is_found(file: Path) -> None:
    script = """
import ctypes, os, sys, threading
def stay():
    fd = os.open(sys.argv[1], os.O_RDONLY)
    print("ready", flush=True)
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)  # exit: of this thread alone
"""
    with subprocess.Popen([sys.executable, "-c", script, str(file)], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        while shared_memory.read_state(process.pid)[0] != "Z":
            time.sleep(0.001)  # The kernel offers nothing to wait for.
        assert find(file).pids == {identity(file): [process.pid]}
        process.stdin.close()


def test_a_process_that_has_ended_holds_nothing_and_is_no_obstacle(file: Path, proc: FakeProc) -> None:
    zombie = proc.add_opaque(5)
    (zombie / "stat").write_text("5 (a) Z 1")
    (zombie / "task").mkdir()
    (proc.path / "6").mkdir()  # It ended after the processes were listed.
    assert find(file, proc.path) == file_holders.Holders({}, [])


def test_on_a_file_system_with_other_devices_in_maps_the_name_decides(file: Path, proc: FakeProc) -> None:
    inode = file.stat().st_ino
    proc.add(5, maps=f"7f00-7f01 rw-s 00000000 ff:ff {inode}   /upper/{file.name}\n")
    proc.add(6, maps=f"7f00-7f01 rw-s 00000000 ff:ff {inode}   /upper/{file.name} (deleted)\n")
    proc.add(7, maps=f"7f00-7f01 rw-s 00000000 ff:ff {inode}   /lib/libc.so\n7f01-7f02 rw-p 00000000 00:00 0 \n")
    assert find(file, proc.path).pids == {identity(file): [5, 6]}


def test_a_process_that_cannot_be_looked_into_is_an_obstacle(file: Path, proc: FakeProc) -> None:
    (proc.add_opaque(5) / "comm").write_bytes(b"\x1b]0;a\xff\n")
    proc.add_opaque(6)
    assert find(file, proc.path).obstacles == [
        "process 5 (\x1b]0;a\udcff) cannot be looked into: Is a directory.",
        "process 6 (worker) cannot be looked into: Is a directory.",
    ]


@pytest.mark.parametrize("missing", ["maps", "fd", "ns/pid"])
def test_a_running_process_without_one_of_the_tables_is_an_obstacle(file: Path, proc: FakeProc, missing: str) -> None:
    place = proc.add(5)
    (place / missing).rename(place / "gone")
    assert find(file, proc.path).obstacles == ["process 5 (worker) cannot be looked into: No such file or directory."]


def test_another_pid_namespace_is_an_obstacle_where_it_uses_the_folder(
    file: Path, proc: FakeProc, tmp_path: Path
) -> None:
    proc.add(5, namespace="pid:[2]", root=str(tmp_path))  # There is no such folder below its root.
    assert find(file, proc.path).obstacles == []
    proc.add(6, namespace="pid:[2]")
    assert find(file, proc.path).obstacles == [
        f"process 6 (worker) runs in another pid namespace, and uses {file.parent} too."
    ]


@pytest.mark.parametrize("option", ["hidepid=2", "rw,hidepid=invisible", "gid=3,hidepid=1"])
def test_a_proc_that_may_hide_processes_is_an_obstacle(file: Path, proc: FakeProc, option: str) -> None:
    proc.mount(option)
    (obstacle,) = find(file, proc.path).obstacles
    assert "it may hide some" in obstacle
    proc.mount("rw,hidepid=0")
    assert find(file, proc.path).obstacles == []


def test_a_proc_of_another_namespace_or_none_is_an_obstacle(file: Path, proc: FakeProc, tmp_path: Path) -> None:
    (proc.path / "self").unlink()
    (proc.path / "self").symlink_to("1")
    (obstacle,) = find(file, proc.path).obstacles
    assert obstacle == f"the processes cannot be looked into: {proc.path}: it shows another pid namespace."
    (obstacle,) = find(file, tmp_path / "missing").obstacles
    assert "No such file or directory" in obstacle


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_cannot_look_into_the_processes_of_root(file: Path) -> None:
    script = """
import json, os, sys
from pathlib import Path
from devguard.support import file_holders
os.setgroups([])
os.setuid(65534)
found = file_holders.find({(1, 1): "a"}, Path("/"), Path("/proc"))
print(json.dumps(found.obstacles))
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    obstacles = json.loads(done.stdout)
    assert any(text.startswith(f"process {os.getpid()} (") for text in obstacles)


class TestTheKernel:
    @pytest.fixture(autouse=True)
    def leases(self, file: Path) -> None:
        if not takes_leases(file):
            pytest.skip("no leases here")

    @pytest.fixture
    def descriptor(self, file: Path) -> Iterator[int]:
        descriptor = os.open(file, os.O_RDONLY)
        yield descriptor
        os.close(descriptor)

    @pytest.mark.parametrize("how", ["open", "open to read", "map", "map to read"])
    def test_knows_whether_a_file_is_open_or_mapped(self, file: Path, descriptor: int, how: str) -> None:
        with holder(file, how):
            assert file_holders.is_open_elsewhere(descriptor)
        assert not file_holders.is_open_elsewhere(descriptor)

    def test_knows_of_a_descriptor_on_its_way(self, file: Path, descriptor: int) -> None:
        one, two = socket.socketpair()
        with one, two:
            sent = os.open(file, os.O_RDONLY)
            socket.send_fds(one, [b"x"], [sent])
            os.close(sent)
            assert file_holders.is_open_elsewhere(descriptor)
        assert not file_holders.is_open_elsewhere(descriptor)

    def test_lets_others_wait_without_ending_this_process(self, file: Path, descriptor: int) -> None:
        asked = threading.Event()
        before = signal.signal(signal.SIGURG, lambda *_: asked.set())
        try:
            assert not file_holders.is_open_elsewhere(descriptor)
            with subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(file), "open"], stdin=-1, stdout=-1) as other:
                assert asked.wait(60)
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                assert other.communicate()[0] == b"ready\n"
        finally:
            signal.signal(signal.SIGURG, before)


def test_without_leases_the_kernel_names_no_holder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    with open(file, "rb") as one, mmap.mmap(one.fileno(), 0, prot=mmap.PROT_READ):
        monkeypatch.setattr(fcntl, "fcntl", fail)
        assert not file_holders.is_open_elsewhere(one.fileno())
