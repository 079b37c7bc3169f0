"""What lies in the folder of shared memory, and what the names of its files say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from multiprocessing import shared_memory as standard
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.support import shared_memory

ANY = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=60)
PIDS = st.integers(1, shared_memory.HIGHEST_PID)
HEX = st.text("0123456789abcdef", min_size=8, max_size=8)
KINDS = st.from_regex(r"[a-z0-9]+(_[a-z0-9]+){0,3}", fullmatch=True)


@pytest.mark.parametrize(
    ("name", "maker", "pid"),
    [
        ("torch_10582_4246530713_0", "torch", 10582),
        ("torch_30417_1951398734", "torch", 30417),
        ("sgl_shm_mm_4711_0a1b2c3d", "SGLang", 4711),
        ("sgl_shm_mm_12_34_0a1b2c3d", "SGLang", 34),  # its kind may hold numbers
        ("multi_tokenizer_args_99", "SGLang", 99),
        ("pym-77-x_0a1b2c", "multiprocessing", 77),
        ("sem.loky-42-abc_def1", "joblib", 42),
        ("sglang_loads_default_0a1b2c3d.shm", "SGLang", None),
        ("sglang_host_pool_0a1b2c3d.mmap", "SGLang", None),
        ("sgldiffusion-request-a1", "SGLang", None),
        ("psm_0a1b2c3d", "multiprocessing.shared_memory", None),
        ("VLLM_OBJECT_STORAGE_SHM_BUFFER", "vLLM", None),
        ("vllm_offload_12345.mmap", "vLLM", None),
        ("nccl-vzIpS6", "NCCL", None),
        ("nccl-123456", "NCCL", None),  # six random characters
        ("cuda.shm.0.2f.1", "CUDA driver", None),
        ("sem.mp-abcdefgh", "multiprocessing", None),
        ("sem.mine", "a semaphore", None),
        ("torch_1_2_3_4", None, None),
        ("torch_0_2_3", None, None),
        ("torch_007_2_3", None, None),
        ("torch_-1_2_3", None, None),
        ("torch_٣_2_3", None, None),
        ("torch_5_٣_2", None, None),
        ("torch_5_2_3\n", None, None),
        ("a_torch_5_2_3", None, None),
        ("sgl_shm_mm_5_0A1B2C3D", None, None),
        ("torch_9999999_1_1", "torch", None),  # more than Linux gives out
        ("12345", None, None),
        ("", None, None),
    ],
)
def test_only_the_forms_of_known_makers_carry_a_pid(name: str, maker: str | None, pid: int | None) -> None:
    assert shared_memory.read_name(name) == (maker, pid)


@given(PIDS, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), KINDS, HEX)
def test_the_pid_of_each_form_is_found(pid: int, random: int, count: int, kind: str, digits: str) -> None:
    for name in (
        f"torch_{pid}_{random}_{count}",
        f"sgl_shm_{kind}_{pid}_{digits}",
        f"multi_tokenizer_args_{pid}",
        f"pym-{pid}-{digits}",
        f"sem.loky-{pid}-{digits}",
    ):
        assert shared_memory.read_name(name)[1] == pid


@given(ANY)
def test_a_pid_is_never_made_up(name: str) -> None:
    maker, pid = shared_memory.read_name(name)
    if pid is not None:
        assert maker is not None
        assert str(pid) in re.split("[-_]", name)


def test_the_names_that_this_python_gives_are_known() -> None:
    assert shared_memory.read_name(standard._make_filename().lstrip("/")) == ("multiprocessing.shared_memory", None)
    synchronize = pytest.importorskip("joblib.externals.loky.backend.synchronize")
    assert shared_memory.read_name("sem." + synchronize.SemLock._make_name().lstrip("/")) == ("joblib", os.getpid())


def test_entries_are_listed_by_the_memory_they_occupy(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 100)
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**30)
    found = {segment.name: segment for segment in shared_memory.scan(tmp_path)}
    assert next(iter(found)) == "big"
    assert found["sparse"].size == 2**30
    assert found["sparse"].nbytes < found["big"].nbytes
    assert found["big"].nbytes >= 100_000
    assert (found["big"].uid, found["big"].links, found["big"].kind) == (os.geteuid(), 1, "file")


def test_links_are_not_followed_and_folders_are_not_entered(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/torch_1_1_1").write_bytes(b"x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    found = {segment.name: segment.kind for segment in shared_memory.scan(tmp_path)}
    assert found == {"folder": "folder", "link": "link", "pipe": "other"}


def test_names_that_are_no_text_are_listed(tmp_path: Path) -> None:
    names = [b"\xff\x1b[31m", "漢字".encode(), b"a\nb"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    assert sorted(os.fsencode(segment.name) for segment in shared_memory.scan(tmp_path)) == sorted(names)


def test_the_age_counts_from_the_last_change_and_is_never_negative(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    os.utime(tmp_path / "a", (0, 0))  # The change of the inode, which cannot be set, still counts.
    now = time.time()
    assert shared_memory.scan(tmp_path, now=now + 100)[0].age_s == pytest.approx(100, abs=50)
    assert shared_memory.scan(tmp_path, now=now - 100)[0].age_s == 0


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shared_memory.scan(tmp_path / "missing")


def test_a_process_is_running_or_has_ended(tmp_path: Path) -> None:
    (tmp_path / f"torch_{os.getpid()}_1_1").write_bytes(b"")
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        ended = process.pid
    (tmp_path / f"torch_{ended}_1_1").write_bytes(b"")
    (tmp_path / "psm_0a1b2c3d").write_bytes(b"")
    found = {segment.pid: segment.process for segment in shared_memory.scan(tmp_path)}
    assert found == {os.getpid(): "running", ended: "ended", None: None}


def test_a_process_that_started_after_the_file_was_made_is_named_so(tmp_path: Path) -> None:
    name = f"torch_{os.getpid()}_1_1"
    (tmp_path / name).write_bytes(b"")
    state, now = os.stat(tmp_path / name), time.time()
    assert shared_memory.describe(name, state, now=now, boot=now).process == "reused"
    assert shared_memory.describe(name, state, now=now, boot=now - 10**9).process == "running"
    assert shared_memory.describe(name, state, now=now, boot=None).process == "running"


def test_without_proc_a_process_counts_as_running(tmp_path: Path) -> None:
    (tmp_path / f"torch_{os.getpid()}_1_1").write_bytes(b"")
    assert shared_memory.scan(tmp_path, proc=tmp_path / "missing")[0].process == "running"


def test_a_process_that_waits_to_be_collected_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert shared_memory.read_state(process.pid)[0] == "Z"
        assert shared_memory.has_ended(process.pid)


def test_a_process_with_a_thread_left_has_not_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        while shared_memory.read_state(process.pid)[0] != "Z":
            time.sleep(0.001)  # The kernel offers nothing to wait for.
        assert not shared_memory.has_ended(process.pid)
        process.stdin.close()


FIRST_THREAD_ENDS = """
import ctypes, os, threading
def stay():
    print("ready", flush=True)
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)  # exit: of this thread alone
"""


def test_a_process_of_another_user_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not shared_memory.has_ended(1)
