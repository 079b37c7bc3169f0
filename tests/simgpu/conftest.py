"""A local package index: a tiny "torch" 99.1.0 with one CUDA library, and NVIDIA's real headers.

A whole overlay is built from it in two seconds, so that the tests can break the build in every way.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TORCH = "99.1.0"
LIBRARY = """
int cudaMalloc(void **, unsigned long), cudaGetDeviceCount(int *), ncclGetVersion(int *), cudaNotThereYet(void);
int count(void) { int n = -1; cudaGetDeviceCount(&n); return n; }
int use(void) { int n; void *p; return cudaMalloc(&p, 1) + ncclGetVersion(&n) + cudaNotThereYet(); }
"""


@dataclasses.dataclass(frozen=True)
class Index:
    """A folder of wheels, and the environment in which pip sees nothing else."""

    wheels: Path

    def environment(self, cache: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "DEVGUARD_"))}
        return kept | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
            "DEVGUARD_CACHE_DIR": str(cache),
            "PYTHONPATH": str(ROOT),
        }


def write_wheel(
    folder: Path, name: str, version: str, files: Mapping[str, bytes], requires: tuple[str, ...] = ()
) -> Path:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    contents = dict(files)
    contents[f"{info}/METADATA"] = metadata.encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    contents[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    return wheel


def torch_files(folder: Path) -> dict[str, bytes]:
    """Return the files of the tiny torch: a library that needs libcudart and libnccl."""
    source, library = folder / "tiny.c", folder / "libtorch_cuda.so"
    source.write_text(LIBRARY)
    for soname in ("libcudart.so.13", "libnccl.so.2"):
        subprocess.run(
            ["cc", "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{soname}", "-o", folder / soname], check=True
        )
    path = "-Wl,--disable-new-dtags,-rpath,$ORIGIN/../../nvidia/nccl/lib:$ORIGIN/../../nvidia/cu13/lib"
    needed = ["-Wl,--no-as-needed", folder / "libcudart.so.13", folder / "libnccl.so.2"]
    subprocess.run(["cc", "-shared", "-fPIC", source, path, *needed, "-o", library], check=True)
    return {
        "torch/__init__.py": b"from torch.version import __version__\n",
        "torch/version.py": b"__version__ = '99.1.0+cu130'\ncuda: object = '13.0'\n",
        "torch/lib/libtorch_cuda.so": library.read_bytes(),
    }


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    scratch = tmp_path_factory.mktemp("scratch")
    write_wheel(folder, "torch", TORCH, torch_files(scratch))
    write_wheel(folder, "torch", "99.2.0", {"torch/version.py": b"__version__ = '99.2.0+cpu'\ncuda: object = None\n"})
    headers = ["nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, *headers], check=True)
    return Index(folder)
