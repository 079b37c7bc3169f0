"""Tests of ``devguard run --trace-contexts`` and of the library that it compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devguard import tracing
from devguard.tracing import library
from tests.helpers.simulated import POSSIBLE, ROOT

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="contexts are traced on Linux only")


def run(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "devguard", "run", *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def refused(*arguments: object, **variables: str) -> str:
    done = run(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_program_without_cuda_runs_unchanged(tmp_path: Path) -> None:
    done = run("--trace-contexts", "--", "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")


def test_invalid_options_are_refused_with_a_remedy() -> None:
    assert "name a program" in refused("--trace-contexts")
    assert "only valid with --trace-contexts" in refused("--output", "file", "--", "true")


def test_a_missing_program_is_reported() -> None:
    done = run("--trace-contexts", "--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "devguard run: there is no program 'no-such-program' on PATH\n")


def test_a_program_that_cannot_be_run_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    done = run("--trace-contexts", "--", broken)
    assert (done.returncode, done.stderr) == (126, f"devguard run: {broken} cannot be run: Exec format error\n")


def test_an_unwritable_output_is_reported_before_the_program_runs(tmp_path: Path) -> None:
    said = refused("--trace-contexts", "--output", tmp_path / "no/folder", "--", "echo", "ran")
    assert said == f"devguard run: cannot write records to {tmp_path}/no/folder: No such file or directory\n"


def test_a_missing_or_broken_compiler_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "bin").mkdir()
    options = ["--trace-contexts", "--", shutil.which("true")]
    said = refused(*options, DEVGUARD_CACHE_DIR=str(cache), PATH=str(tmp_path / "bin"), CC="")
    assert said.startswith("devguard run: traced contexts need a C compiler, and neither cc, gcc nor clang is on PATH")
    assert "apt install gcc" in said
    said = refused(*options, DEVGUARD_CACHE_DIR=str(cache), CC="icc")
    assert "CC=icc is not an installed program" in said
    broken = tmp_path / "bin/broken-cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: dlfcn.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = refused(*options, DEVGUARD_CACHE_DIR=str(cache), CC=str(broken))
    assert "the source of the context tracer could not be compiled" in said
    assert "dlfcn.h" in said
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert run(*options, DEVGUARD_CACHE_DIR=str(cache)).returncode == 0
    assert len(list((cache / "tracing").iterdir())) == 1
    assert run(*options, DEVGUARD_CACHE_DIR=str(cache), CC="icc").returncode == 0  # the library exists already


@pytest.mark.parametrize("name", ["a b", "a:b", "$LIB"])
def test_a_cache_path_that_ld_preload_cannot_name_is_reported(tmp_path: Path, name: str) -> None:
    said = refused("--trace-contexts", "--", "true", DEVGUARD_CACHE_DIR=str(tmp_path / name))
    assert "because of a space or a colon" in said
    assert "DEVGUARD_CACHE_DIR" in said


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused("--trace-contexts", "--", "true", DEVGUARD_CACHE_DIR=str(tmp_path / "file"))
    assert said.startswith(f"devguard run: cannot create {tmp_path}/file/tracing/libdevguard-trace-")
    assert "Not a directory; set DEVGUARD_CACHE_DIR" in said


def test_a_library_that_others_can_change_is_not_preloaded(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = ["--trace-contexts", "--", "echo", "ran"]
    assert run(*options, DEVGUARD_CACHE_DIR=str(cache)).stdout == "ran\n"
    (planted,) = (cache / "tracing").iterdir()
    assert [each.stat().st_mode & 0o077 for each in (cache, cache / "tracing", planted)] == [0, 0, 0]
    for place in (planted, cache / "tracing", cache):
        before = place.stat().st_mode
        place.chmod(0o777)
        said = refused(*options, DEVGUARD_CACHE_DIR=str(cache))
        assert said.startswith(f"devguard run: {place} belongs to ")
        assert "others can write to it (mode 0777)" in said
        place.chmod(before)
        if os.geteuid() == 0:
            os.chown(place, 12345, 12345)
            said = refused(*options, DEVGUARD_CACHE_DIR=str(cache))
            assert said.startswith(f"devguard run: {place} belongs to uid 12345, not to root (uid 0)")
            os.chown(place, 0, 0)
    assert run(*options, DEVGUARD_CACHE_DIR=str(cache)).stdout == "ran\n"


@pytest.mark.parametrize("target", ["/nowhere", "pipe"])
def test_something_else_in_the_place_of_the_library_is_reported(tmp_path: Path, target: str) -> None:
    cache = tmp_path / "cache"
    options = ["--trace-contexts", "--", "true"]
    assert run(*options, DEVGUARD_CACHE_DIR=str(cache)).returncode == 0
    (place,) = (cache / "tracing").iterdir()
    place.unlink()
    place.symlink_to(target)
    os.mkfifo(cache / "tracing/pipe", 0o600)
    assert str(place) in refused(*options, DEVGUARD_CACHE_DIR=str(cache))


def test_a_relative_cache_of_the_desktop_is_not_used(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = "import os; print(os.environ['LD_PRELOAD'])"
    done = run(
        "--trace-contexts", "--", sys.executable, "-c", code,
        cwd=tmp_path, XDG_CACHE_HOME="cache", HOME=str(home), DEVGUARD_CACHE_DIR="",
    )  # fmt: skip
    assert done.stdout.startswith(f"{home}/.cache/devguard/tracing/libdevguard-trace-"), done


@pytest.mark.parametrize("machine", ["ppc64le", "x86_64"])
def test_an_unsupported_platform_is_reported(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    with pytest.raises(tracing.TracingError, match=rf"\(x86_64 or aarch64\), not on linux \({machine}\)"):
        tracing.environment()


def test_the_environment_keeps_preloaded_libraries_and_can_be_derived_twice(tmp_path: Path) -> None:
    base = {"LD_PRELOAD": "/mine.so /other.so", "DEVGUARD_TRACE_OUTPUT": "/stale", "PATH": "/bin"}
    first = tracing.environment(base=base)
    ours = str(library.library())
    assert first == {"LD_PRELOAD": f"{ours}:/mine.so:/other.so", "PATH": "/bin"}
    second = tracing.environment(tmp_path / "records", json=True, base=first)
    assert second == first | {
        "DEVGUARD_TRACE_OUTPUT": str(tmp_path / "records"),
        "DEVGUARD_TRACE_FORMAT": "json",
    }
    assert (tmp_path / "records").read_bytes() == b""
    assert base["LD_PRELOAD"] == "/mine.so /other.so"


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    sources = [str(source) for source in library.SOURCES.glob("*.c")]
    command = ["cc", *library.FLAGS, "-Werror", "-o", str(tmp_path / "library.so"), *sources, *library.LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_quick_and_imports_no_torch() -> None:
    code = """if True:
        import sys
        from devguard.cli import main
        try:
            main(["run", "--help"])
        finally:
            print({"torch", "devguard.tracing", "subprocess"} & {*sys.modules})
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n")
    assert "devguard run --trace-contexts" in done.stdout
