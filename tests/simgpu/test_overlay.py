"""The overlay: built once, and complete or absent, even if the build fails at any point."""

from __future__ import annotations

import http.server
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from devguard import simgpu
from devguard.simgpu import cached, native, overlay
from tests.simgpu.conftest import ROOT, TORCH, Index

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated GPUs exist for Linux only")


def make(env: dict[str, str], torch: str = TORCH) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "devguard", "sim", "--json", "--torch", torch]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def start(env: dict[str, str], **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "devguard", "sim", "--json", "--torch", TORCH]
    return subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def folders(cache: Path) -> list[str]:
    place = cache / "simgpu"
    return sorted(each.name for each in place.iterdir() if each.suffix != ".lock") if place.exists() else []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def env(index: Index, cache: Path) -> dict[str, str]:
    return index.environment(cache)


def check_refused(env: dict[str, str], cache: Path, *words: str, torch: str = TORCH) -> str:
    """Check that the build fails with one message that contains these words, and leaves nothing behind; return it."""
    done = make(env, torch)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert folders(cache) == []
    return done.stderr


def test_an_overlay_is_built_once_and_reused_without_pip_or_compiler(env: dict[str, str], cache: Path) -> None:
    first = make(env)
    assert first.returncode == 0, first.stderr
    assert "building simulated GPUs for torch 99.1.0" in first.stderr
    ready = json.loads(first.stdout)
    assert ready["torch"] == TORCH
    assert ready["needs"] is None
    assert [ready["overlay"]] == [str(cache / "simgpu" / name) for name in folders(cache)]
    second = make(env | {"CC": "no-such-compiler", "PIP_FIND_LINKS": "/nonexistent"})
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")

    site = Path(ready["overlay"], "site")
    assert {each.name for each in (site / "nvidia/cu13/lib").iterdir()} == {
        "libcudart.so.13",
        "libnccl.so.2",
        "libcuda.so.1",
        "libnvidia-ml.so.1",
    }
    assert not list(Path(ready["overlay"]).rglob("*.h"))
    code = f"import ctypes; print(ctypes.CDLL({str(site / 'torch/lib/libtorch_cuda.so')!r}).count())"
    assert subprocess.check_output([sys.executable, "-c", code], env=env | {"DEVGUARD_SIM_GPUS": "3"}) == b"3\n"


@pytest.mark.parametrize("damage", ["cut", "delete", "empty manifest", "no manifest"])
def test_a_damaged_overlay_is_rebuilt(env: dict[str, str], damage: str) -> None:
    place = Path(json.loads(make(env).stdout)["overlay"])
    library = place / "site/torch/lib/libtorch_cuda.so"
    size = library.stat().st_size
    if damage == "cut":
        os.truncate(library, size // 2)
    elif damage == "delete":
        library.unlink()
    elif damage == "empty manifest":
        (place / "manifest.json").write_text("")
    else:
        (place / "manifest.json").unlink()
    again = make(env)
    assert again.returncode == 0, again.stderr
    assert "building simulated GPUs" in again.stderr
    assert Path(json.loads(again.stdout)["overlay"]) == place
    assert library.stat().st_size == size
    assert folders(place.parent.parent) == [place.name]


def plant(cache: Path, owner: int = 0, mode: int = 0o755) -> Path:
    """Put a folder where the overlay belongs, with a manifest that vouches for a library of somebody else."""
    name = f"torch-{TORCH}-{sys.implementation.cache_tag}{sys.abiflags}-{overlay._source_hash()}"
    place = cache / "simgpu" / name
    (place / "site").mkdir(parents=True)
    (place / "site/sitecustomize.py").write_text("print('planted')\n")
    listed = {"format": cached.FORMAT, "files": dict(cached.files(place))}
    (place / "manifest.json").write_text(json.dumps(listed))
    for each in [cache, *cache.rglob("*")]:
        each.chmod(mode if each.is_dir() else 0o644)
        if owner:
            os.chown(each, owner, owner)
    return place


@pytest.mark.parametrize("program", [[], ["--", sys.executable, "-c", "print('ran')"]])
def test_an_overlay_planted_in_a_shared_cache_is_refused(env: dict[str, str], cache: Path, program: list[str]) -> None:
    is_root = os.geteuid() == 0
    plant(cache, *((12345, 0o755) if is_root else (0, 0o777)))
    command = [sys.executable, "-m", "devguard", "sim", "--torch", TORCH, *program]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert f"{cache} belongs to " + ("uid 12345, not to root" if is_root else "") in done.stderr
    assert "Set DEVGUARD_CACHE_DIR to a folder that only you can write to" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("names", ["not json", '["../victim"]', '["VICTIM"]', "7", "[[]]", "[]"])
def test_a_damaged_list_of_compiled_files_deletes_nothing(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    first = Path(json.loads(make(env).stdout)["overlay"])
    victim = first.parent / "victim"
    victim.touch()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (first / overlay.COMPILED).write_text(names.replace("VICTIM", str(victim)))
    (first / cached.MANIFEST).unlink()
    listed = {"format": cached.FORMAT, "files": dict(cached.files(first))}
    (first / cached.MANIFEST).write_text(json.dumps(listed))
    monkeypatch.setattr(overlay, "_source_hash", lambda: "another")
    assert cached.whole(overlay.prepare(TORCH, progress=False).folder)
    assert victim.exists()


@pytest.mark.parametrize("name", ["a:b", "a;b", "$ORIGIN"])
def test_a_cache_that_a_search_path_cannot_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("DEVGUARD_CACHE_DIR", str(tmp_path / name))
    with pytest.raises(simgpu.SimulationError, match=r"search paths cannot name .* set DEVGUARD_CACHE_DIR"):
        overlay.prepare(TORCH, progress=False)


def test_a_new_simulation_shares_the_torch_of_an_old_one(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = Path(json.loads(make(env).stdout)["overlay"])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(overlay, "_source_hash", lambda: "another")
    second = overlay.prepare(TORCH, progress=False).folder
    assert second != first
    library = "site/torch/lib/libtorch_cuda.so"
    assert os.path.samefile(first / library, second / library)
    runtime = "site/nvidia/cu13/lib/libcudart.so.13"
    assert not os.path.samefile(first / runtime, second / runtime)
    assert cached.whole(first)
    assert cached.whole(second)


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "aarch64")])
def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(simgpu.SimulationError, match=rf"need Linux on x86-64, and this is {system} on {machine}"):
        simgpu.environment(2)


def test_another_c_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(simgpu.SimulationError, match="glibc"):
        simgpu.environment(2)


@pytest.mark.parametrize("version", ["2.5.1", "1.13", "newest", "2.13; rm", "../2.13"])
def test_a_version_that_is_invalid_or_too_old_is_refused(version: str) -> None:
    with pytest.raises(simgpu.SimulationError, match=r"2\.13\.0"):
        simgpu.environment(2, torch=version)


@pytest.mark.parametrize("gpus", [0, -1, 17, True, 2.0, "2"])
def test_a_number_of_gpus_out_of_range_is_refused(gpus: object) -> None:
    with pytest.raises(simgpu.SimulationError, match="from 1 to 16"):
        simgpu.environment(gpus)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [0, -5, 1 << 20, 1 << 60])
def test_memory_out_of_range_is_refused(memory: int) -> None:
    with pytest.raises(simgpu.SimulationError, match=r"too (small|big)"):
        simgpu.environment(2, memory=memory)


def test_a_missing_compiler_is_reported_before_the_download(env: dict[str, str], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    message = check_refused(env | {"PATH": str(tmp_path / "bin")}, cache, "C compiler", "apt install gcc")
    assert "downloading" not in message
    check_refused(env | {"CC": "icc"}, cache, "CC=icc", "is not an installed program")


def test_missing_binutils_are_reported(env: dict[str, str], cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compiler = shutil.which("cc")
    assert compiler
    (tmp_path / "bin/cc").symlink_to(compiler)
    check_refused(env | {"PATH": str(tmp_path / "bin")}, cache, "readelf", "binutils")


def test_a_compiler_without_headers_is_reported(env: dict[str, str], cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: stdio.h: No such file or directory' >&2\nexit 1\n")
    broken.chmod(0o755)
    check_refused(env | {"CC": str(broken)}, cache, "could not be compiled", "libc6-dev", "stdio.h")


def test_a_missing_network_is_reported(env: dict[str, str], cache: Path) -> None:
    offline = {name: value for name, value in env.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    offline["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"
    check_refused(offline, cache, "could not be downloaded", "check the network", "torch===99.1.0")


def test_an_index_without_the_version_is_reported(env: dict[str, str], cache: Path) -> None:
    check_refused(env, cache, "has no torch===99.9.9", "--torch", torch="99.9.9")


def test_a_wheel_that_is_not_a_cuda_build_is_reported(env: dict[str, str], cache: Path) -> None:
    check_refused(env, cache, "not a CUDA build", "pip config list", torch="99.2.0")


@pytest.fixture
def server(index: Index) -> Iterator[tuple[str, dict[str, int]]]:
    """A package index over HTTP that sends only ``limit["bytes"]`` bytes of each wheel, unless the limit is 0."""
    limit = {"bytes": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wheels = [wheel.name for wheel in index.wheels.iterdir()]
            if self.path.endswith(".whl"):
                body = (index.wheels / self.path.rpartition("/")[2]).read_bytes()
            else:
                body = "".join(f'<a href="/files/{name}">{name}</a>\n' for name in wheels).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/zip" if self.path.endswith(".whl") else "text/html")
            self.end_headers()
            cut = limit["bytes"] if self.path.endswith(".whl") else 0
            self.wfile.write(body[: cut or None])

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/simple", limit
        httpd.shutdown()
        thread.join()


def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(
    env: dict[str, str], cache: Path, server: tuple[str, dict[str, int]]
) -> None:
    url, limit = server
    online = {name: value for name, value in env.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    online["PIP_INDEX_URL"] = url
    limit["bytes"] = 3000
    check_refused(online, cache, "was interrupted or damaged", "run the command again")
    limit["bytes"] = 0
    assert make(online).returncode == 0


def test_a_damaged_wheel_is_reported(env: dict[str, str], cache: Path, index: Index, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    shutil.copytree(index.wheels, wheels)
    wheel = next(wheels.glob("torch-99.1.0*"))
    os.truncate(wheel, wheel.stat().st_size // 2)
    check_refused(env | {"PIP_FIND_LINKS": str(wheels)}, cache, "was interrupted or damaged")


def test_too_little_space_is_reported_before_the_download(
    env: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(overlay, "NEEDED_BYTES", 10**18)
    with pytest.raises(
        simgpu.SimulationError, match=r"GB free, and building simulated GPUs takes about .* DEVGUARD_CACHE_DIR"
    ):
        overlay.prepare(TORCH, progress=False)
    assert folders(cache) == []


@pytest.mark.parametrize("size", ["1m", "3m"])  # full while pip unpacks, and full while the sources are compiled
def test_a_disk_that_fills_up_during_the_build_is_reported(env: dict[str, str], tmp_path: Path, size: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    code = """if True:
        import os, sys
        from devguard.simgpu import SimulationError, overlay
        overlay.NEEDED_BYTES = 0
        try:
            overlay.prepare(sys.argv[1], progress=False)
        except SimulationError as error:
            left = [name for name in os.listdir(overlay.cache_folder()) if not name.endswith(".lock")]
            print(error, left)
    """
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(disk), sys.executable, "-c", code, TORCH]
    done = subprocess.run(
        command, env=env | {"DEVGUARD_CACHE_DIR": str(disk)}, cwd=ROOT, capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert "the disk is full" in done.stdout, done
    assert "free about 2 GB" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_an_unwritable_cache_is_reported(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = make(env | {"DEVGUARD_CACHE_DIR": str(tmp_path / "file")})
    assert done.returncode == 2
    assert "cannot be created" in done.stderr
    assert "DEVGUARD_CACHE_DIR" in done.stderr


def test_processes_that_start_at_once_wait_for_one_build(env: dict[str, str], cache: Path) -> None:
    name = f"torch-{TORCH}-{sys.implementation.cache_tag}{sys.abiflags}-{overlay._source_hash()}"
    (cache / "simgpu").mkdir(parents=True)
    with filelock.FileLock(cache / "simgpu" / f"{name}.lock"):
        both = [start(env), start(env)]
        for each in both:
            assert each.stderr
            assert "waiting for it" in each.stderr.readline()  # Both now wait for the lock.
    outputs = [each.communicate(timeout=200) for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("compiling" in stderr for _, stderr in outputs) == 1
    assert folders(cache) == [name]


def test_the_remains_of_a_killed_build_are_not_used(env: dict[str, str], cache: Path, tmp_path: Path) -> None:
    fifo, stuck = tmp_path / "fifo", tmp_path / "stuck-cc"
    os.mkfifo(fifo)
    stuck.write_text(f"#!/bin/sh\necho here > {fifo}\nexec sleep 1000\n")
    stuck.chmod(0o755)
    with start(env | {"CC": str(stuck)}, start_new_session=True) as builder:
        assert fifo.read_text() == "here\n"  # The compiler runs now: torch is unpacked, and nothing is ready.
        os.killpg(builder.pid, signal.SIGKILL)
    (left,) = folders(cache)
    assert ".building-" in left
    again = make(env)
    assert again.returncode == 0, again.stderr
    assert folders(cache) == [Path(json.loads(again.stdout)["overlay"]).name]


def test_without_pip_the_copy_bundled_with_python_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from devguard.simgpu import wheels

    find = wheels.importlib.util.find_spec
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    command = wheels._pip()
    assert subprocess.check_output([*command, "--version"], text=True).startswith("pip ")
    monkeypatch.setattr(wheels, "_bundled_pip", list)
    with pytest.raises(simgpu.SimulationError, match="uv pip install pip"):
        wheels._pip()


def test_an_environment_without_torch_gets_what_torch_needs(tmp_path: Path) -> None:
    """The environment has no pip either, like those of uv. The default version of torch is used."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin/python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "filelock",
        "rich",
    ]
    subprocess.run(pip, check=True)
    code = "import torch, sympy; print(torch.__version__, torch.ones(2).to('cuda:1').device, sympy.__file__)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DEVGUARD_SIM")}
    env["PYTHONPATH"] = str(ROOT)
    before = sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts)
    command = [python, "-m", "devguard", "sim", "--", python, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, device, sympy = done.stdout.split()
    assert (version.partition("+")[0], device) == (overlay.DEFAULT_TORCH, "cuda:1")
    assert "/needs-" in sympy
    after = sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts)
    assert after == before  # Nothing was installed there.


def test_the_package_contains_no_headers_of_nvidia() -> None:
    assert {source.name for source in native.SOURCES.glob("*.h")} == {"sim.h"}
