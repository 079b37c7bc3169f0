"""The state file: the records of live and dead processes, and the files that are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devguard import SimulationError, cli, simgpu
from devguard.simgpu import overlay, records
from tests.helpers.simulated import ROOT, Finished
from tests.simgpu.conftest import TORCH, Index

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated GPUs exist for Linux only")


@pytest.fixture(scope="module")
def tiny(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated runtime of an overlay without a real torch, with which processes start fast."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in index.environment(cache).items():
            patch.setenv(name, value)
        return overlay.prepare(TORCH, progress=False).folder / "site/nvidia/cu13/lib/libcudart.so.13"


def hold(runtime: Path, state: Path, mib: int, then: str = "") -> int:
    """Run a process that allocates memory on GPU 1, runs `then`, and ends without freeing; return its pid."""
    code = f"""if True:
        import ctypes, os, sys
        cuda, p = ctypes.CDLL({str(runtime)!r}), ctypes.c_void_p()
        assert cuda.cudaSetDevice(1) == 0
        assert cuda.cudaMalloc(ctypes.byref(p), ctypes.c_size_t({mib} << 20)) == 0
        {then}
        print(os.getpid(), flush=True)
    """
    env = os.environ | {"DEVGUARD_SIM_GPUS": "2", "DEVGUARD_SIM_STATE": str(state)}
    return int(subprocess.check_output([sys.executable, "-c", code], env=env))


def test_records_of_dead_processes_stay_readable_but_take_no_memory(tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = hold(tiny, state, 2000)
    second = hold(tiny, state, 7000)  # of 8192: too much if the first process still took memory
    third = hold(tiny, state, 7000, "assert cuda.cudaFree(p) == 0")
    dead = simgpu.state(state)
    assert [(p.pid, p.alive) for p in dead] == [(first, False), (second, False), (third, False)]
    assert [p.devices[1].bytes >> 20 for p in dead] == [2000, 7000, 0]
    assert [p.devices[1].peak_bytes >> 20 for p in dead] == [2000, 7000, 7000]
    assert [[d.context for d in p.devices] for p in dead] == [[False, True]] * 3
    assert [p.devices[1].allocations for p in dead] == [1, 1, 1]


@pytest.mark.parametrize(
    ("words", "kept", "name"),
    [
        (["script.py", "--api-key=hunter2"], ["script.py"], "script.py"),
        (["-W", "ignore", "-u", "script.py", "hunter2"], ["-W", "ignore", "-u", "script.py"], "script.py"),
        (["-m", "script", "hunter2"], ["-m", "script"], "python -m script"),
        (["-c", "import script; key = 'hunter2'"], ["-c"], "python -c"),
        (
            ["-c", "import script; from multiprocessing import spawn; 'hunter2'"],
            ["-c", "multiprocessing"],
            "multiprocessing child",
        ),
    ],
)
def test_a_state_file_is_for_this_user_alone_and_holds_no_arguments(
    tiny: Path, tmp_path: Path, words: list[str], kept: list[str], name: str
) -> None:
    (tmp_path / "script.py").write_text(
        f"import ctypes\ncuda, p = ctypes.CDLL({str(tiny)!r}), ctypes.c_void_p()\n"
        "assert cuda.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(1)) == 0\n"
    )
    state, log = tmp_path / "state", tmp_path / "log"
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    env = os.environ | {"DEVGUARD_SIM_GPUS": "1", "DEVGUARD_SIM_STATE": str(state), "DEVGUARD_SIM_LOG": str(log)}
    subprocess.run([python, *words], env=env | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True, umask=0)
    assert [oct(each.stat().st_mode & 0o777) for each in (state, log)] == ["0o600", "0o600"]
    raw = state.read_bytes()
    assert b"hunter2" not in raw
    assert b"\0".join([str(python).encode(), *(word.encode() for word in kept)]) + b"\0" in raw
    assert [process.name for process in simgpu.state(state)] == [name]


def test_a_state_file_that_is_made_here_is_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        records.create(tmp_path / "state", memory=1 << 30, context_bytes=1 << 28)
    finally:
        os.umask(before)
    assert oct((tmp_path / "state").stat().st_mode & 0o777) == "0o600"


def test_a_state_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    records.create(path, memory=1 << 30, context_bytes=1 << 28)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(SimulationError, match="belongs to another user"):
        records.create(path, memory=1 << 30, context_bytes=1 << 28)


def test_a_hostile_state_file_is_an_error_or_shown_without_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "999")
    path = tmp_path / "state"
    name = b"\x1b[31mred\n\xff[bold]"
    record = records.PROCESS.pack(7, 2**31 - 1, 1, 0, 2**32 - 1, 0, name, *[2**64 - 1] * (records.DEVICES * 5))
    header = records.HEADER.pack(records.MAGIC, records.VERSION, records.SLOTS, records.PROCESS.size, 1, 0, 0, 0)
    path.write_bytes((header + record).ljust(records.SIZE, b"\0"))
    assert cli.main(["sim", "--state", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out.replace("\n", "")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(SimulationError, match=r"is not a state file|cannot be read"):
            records.state(wrong)


def test_a_live_process_is_alive_and_a_zombie_is_not(tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    code = f"""if True:
        import ctypes, sys
        cuda, p = ctypes.CDLL({str(tiny)!r}), ctypes.c_void_p()
        assert cuda.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(1)) == 0
        print("ready", flush=True)
        sys.stdin.read()
    """
    env = os.environ | {"DEVGUARD_SIM_GPUS": "2", "DEVGUARD_SIM_STATE": str(state), "DEVGUARD_SIM_NAME": "rank 1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"ready\n"
        (live,) = simgpu.state(state)
        assert (live.pid, live.alive, live.name) == (process.pid, True, "rank 1")
        assert live.devices[0] == simgpu.DeviceState(0, True, 2 << 20, 2 << 20, 1, 0, 0)
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # It has ended, and its parent has not reaped it.
        (zombie,) = simgpu.state(state)
        assert not zombie.alive


def test_a_full_file_drops_the_oldest_dead_process_first(tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    code = f"""if True:
        import ctypes, os
        for i in range({records.SLOTS + 3}):
            pid = os.fork()
            if not pid:
                n = ctypes.c_int()
                os._exit(ctypes.CDLL({str(tiny)!r}).cudaGetDeviceCount(ctypes.byref(n)))
            assert os.waitpid(pid, 0)[1] == 0
            print(pid)
    """
    env = os.environ | {"DEVGUARD_SIM_GPUS": "1", "DEVGUARD_SIM_STATE": str(state)}
    pids = [int(pid) for pid in subprocess.check_output([sys.executable, "-c", code], env=env).split()]
    assert [process.pid for process in simgpu.state(state)] == pids[3:]


def test_the_records_are_plain_data() -> None:
    device = simgpu.DeviceState(0, True, 1, 2, 3, 4, 5)
    process = simgpu.ProcessState(1, "a", True, (device,))
    assert json.loads(json.dumps(process.as_dict())) == json.loads(json.dumps(dataclasses.asdict(process)))
    assert device.as_dict()["peak_bytes"] == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.bytes = 7  # type: ignore[misc]


def test_foreign_and_missing_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign, other, missing = tmp_path / "notes", tmp_path / "other", tmp_path / "missing"
    foreign.write_text("my notes")
    with pytest.raises(simgpu.SimulationError, match="is not a state file of simulated GPUs"):
        simgpu.state(foreign)
    records.create(other, memory=1 << 30, context_bytes=1 << 28)
    assert simgpu.state(other) == ()
    raw = bytearray(other.read_bytes())
    raw[8] = 9
    other.write_bytes(raw)
    with pytest.raises(simgpu.SimulationError, match="version 9, written by another release"):
        simgpu.state(other)
    with pytest.raises(simgpu.SimulationError, match="cannot be read"):
        simgpu.state(missing)
    with pytest.raises(simgpu.SimulationError, match="is not a state file"):
        records.create(foreign, memory=1, context_bytes=1)
    assert foreign.read_text() == "my notes"
    with pytest.raises(simgpu.SimulationError, match="cannot be created"):
        records.create(tmp_path / "no" / "folder", memory=1, context_bytes=1)
    monkeypatch.delenv("DEVGUARD_SIM_STATE", raising=False)
    with pytest.raises(simgpu.SimulationError, match="no state file is given"):
        simgpu.state()


def test_the_simulation_never_writes_into_a_foreign_file(tiny: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "notes"
    foreign.write_text("my notes")
    code = f"import ctypes; print(ctypes.CDLL({str(tiny)!r}).cudaSetDevice(0))"
    env = os.environ | {"DEVGUARD_SIM_GPUS": "1", "DEVGUARD_SIM_STATE": str(foreign)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"  # cudaErrorInitializationError
    assert "is not a state file of this version" in done.stderr
    assert foreign.read_text() == "my notes"


def test_importing_simgpu_imports_neither_torch_nor_the_builder() -> None:
    code = (
        "import sys, devguard.simgpu as s; s.active(); "
        "print(sorted({'torch', 'rich', 'filelock', 'platformdirs', 'subprocess', 'devguard.simgpu.overlay'} "
        "& {*sys.modules}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_the_environment_is_complete_and_keeps_the_base(
    sim_environment: Callable[..., dict[str, str]], run_simulated: Callable[..., Finished], tmp_path: Path
) -> None:
    base = {"PYTHONPATH": "/mine", "LD_LIBRARY_PATH": "/libs", "CUDA_VISIBLE_DEVICES": "1", "HOME": os.environ["HOME"]}
    base["DEVGUARD_SIM_LOG"] = "/stale/log"
    untouched = dict(os.environ)
    first = simgpu.environment(3, base=base, memory=(1 << 30) + 5)
    assert base["PYTHONPATH"] == "/mine"
    path = first["PYTHONPATH"].split(os.pathsep)
    assert path[-1] == "/mine"
    assert path[0].endswith("/site")
    assert first["LD_LIBRARY_PATH"].endswith("/driver:/libs")
    assert first["CUDA_VISIBLE_DEVICES"] == "1"
    assert first["DEVGUARD_SIM_GPUS"] == "3"
    assert first["DEVGUARD_SIM_MEMORY_MB"] == "1024"
    assert "DEVGUARD_SIM_LOG" not in first
    assert simgpu.state(first["DEVGUARD_SIM_STATE"]) == ()
    second = simgpu.environment(2, base=first, log=tmp_path / "log", state=tmp_path / "state")
    assert second["PYTHONPATH"] == first["PYTHONPATH"]  # not twice
    assert second["LD_LIBRARY_PATH"] == first["LD_LIBRARY_PATH"]
    assert second["DEVGUARD_SIM_STATE"] == str(tmp_path / "state")
    assert second["DEVGUARD_SIM_LOG"] == str(tmp_path / "log")
    assert dict(os.environ) == untouched
