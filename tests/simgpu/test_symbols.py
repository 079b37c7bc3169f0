"""The NVIDIA libraries and symbols that a build of torch needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from devguard import SimulationError
from devguard.simgpu.symbols import wanted
from tests.simgpu.conftest import torch_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulated GPUs exist for Linux only")


@pytest.fixture
def torch_lib(tmp_path: Path) -> Path:
    """``torch/lib`` of the tiny torch of these tests."""
    folder = tmp_path / "site/torch/lib"
    folder.mkdir(parents=True)
    (folder / "libtorch_cuda.so").write_bytes(torch_files(tmp_path)["torch/lib/libtorch_cuda.so"])
    return folder


def test_the_undefined_symbols_are_found_with_their_libraries(torch_lib: Path) -> None:
    found = wanted(torch_lib)
    assert found.runtime == "libcudart.so.13"
    assert found.cuda == {"cudaMalloc", "cudaGetDeviceCount", "cudaNotThereYet"}
    assert found.stubs == {"libnccl.so.2": {"ncclGetVersion": ""}}


def test_the_folder_of_the_runtime_is_preferred(torch_lib: Path) -> None:
    assert wanted(torch_lib).folder == torch_lib.parents[1] / "nvidia/cu13/lib"


def test_symbols_that_torch_defines_itself_are_not_wanted(torch_lib: Path) -> None:
    source = torch_lib.parent / "own.c"
    source.write_text("int cudaNotThereYet(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", torch_lib / "libtorch_own.so"], check=True)
    assert "cudaNotThereYet" not in wanted(torch_lib).cuda


def test_a_torch_without_the_runtime_is_not_supported(tmp_path: Path) -> None:
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "libtorch_cuda.so"], check=True)
    with pytest.raises(SimulationError, match="not supported on simulated GPUs"):
        wanted(tmp_path)


def test_a_file_that_is_no_library_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "libtorch_cuda.so").write_text("text")
    with pytest.raises(SimulationError, match=r"could not read .*libtorch_cuda\.so"):
        wanted(tmp_path)
