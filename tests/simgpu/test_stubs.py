"""Stub libraries: functions that do nothing and report success."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devguard.simgpu.stubs import stub_source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated GPUs exist for Linux only")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ctypes.CDLL]:
    """``load(library, *symbols)``: the compiled stub library."""

    def compiled(library: str, *symbols: str) -> ctypes.CDLL:
        (tmp_path / "stub.c").write_text(stub_source(library, symbols))
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "stub.c", "-o", library], cwd=tmp_path, check=True)
        return ctypes.CDLL(str(tmp_path / library))

    return compiled


def test_a_function_reports_success(load: Callable[..., ctypes.CDLL]) -> None:
    assert load("libnccl.so.2", "ncclAllReduce").ncclAllReduce(1, 2, 3) == 0


def test_a_function_that_creates_something_returns_a_handle(load: Callable[..., ctypes.CDLL]) -> None:
    handle = ctypes.c_void_p()
    library = load("libcublas.so.13", "cublasCreate_v2", "cublasDestroy_v2")
    assert library.cublasCreate_v2(ctypes.byref(handle)) == 0
    assert handle.value
    assert library.cublasDestroy_v2(handle) == 0


def test_a_version_query_returns_a_version(load: Callable[..., ctypes.CDLL]) -> None:
    version = ctypes.c_int()
    assert load("libnccl.so.2", "ncclGetVersion").ncclGetVersion(ctypes.byref(version)) == 0
    assert version.value > 20000


def test_an_error_text_is_a_string(load: Callable[..., ctypes.CDLL]) -> None:
    library = load("libnccl.so.2", "ncclGetErrorString")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    assert b"simulated GPU" in library.ncclGetErrorString(0)


def test_the_source_does_not_depend_on_the_order_of_the_symbols() -> None:
    assert stub_source("libnccl.so.2", ["b", "a"]) == stub_source("libnccl.so.2", ["a", "b"])
