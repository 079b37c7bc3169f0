"""Finds the NVIDIA libraries and symbols that torch's libraries need, and the folder of each, with readelf and nm."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

from devguard.errors import SimulationError

__all__ = ["Wanted", "wanted"]

# libcudart, libcublas, libnvrtc, libnvshmem_host, libnccl, ... and nothing else: not libz, not libgomp
NVIDIA = re.compile(r"lib(cu|nv|nccl)")
# The runtime, the driver and NVML, which are all in libcudart here. cuFile has its own library.
CUDA = re.compile(r"(__)?cuda[A-Z]|cu[A-Z](?!File)|nvml")
# A prefix of symbols, and the library that defines them. The first match counts.
PREFIXES = (
    ("cublasLt", "libcublasLt"),
    ("cublas", "libcublas"),
    ("cudnn", "libcudnn"),
    ("cufft", "libcufft"),
    ("cusparseLt", "libcusparseLt"),
    ("cusparse", "libcusparse"),
    ("cusolver", "libcusolver"),
    ("curand", "libcurand"),
    ("nccl", "libnccl"),
    ("nvshmem", "libnvshmem_host"),
    ("cuFile", "libcufile"),
    ("cupti", "libcupti"),
    ("nvrtc", "libnvrtc"),
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The NVIDIA libraries and symbols that one build of torch needs.

    Attributes
    ----------
    folder : Path
        The folder that its libraries search first (their DT_RPATH).
    runtime : str
        The soname of libcudart.
    cuda : frozenset of str
        The undefined symbols of the CUDA runtime, the driver and NVML.
    stubs : dict of str to dict of str to str
        Soname -> symbol -> the required version, "" for none.
    """

    folder: Path
    runtime: str
    cuda: frozenset[str]
    stubs: dict[str, dict[str, str]]


def wanted(folder: Path) -> Wanted:
    """Find the NVIDIA libraries and symbols that the libraries in torch's own folder need.

    Parameters
    ----------
    folder : Path
        ``torch/lib``.
    """
    libraries = sorted(folder.glob("*.so*"))
    own = {library.name for library in libraries}
    needed: set[str] = set()
    undefined: dict[str, str] = {}
    defined: set[str] = set()
    paths: list[str] = []
    for library in libraries:
        for line in _output("readelf", "-d", library):
            if found := re.search(r"\(NEEDED\).*\[(.*)\]", line):
                needed.add(found[1])
            elif (found := re.search(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", line)) and library.name == "libtorch_cuda.so":
                paths = found[1].split(":")
        for line in _output("nm", "-D", library):
            fields = line.split()
            symbol, _, version = fields[-1].partition("@")
            if fields[-2] in "Uw":
                undefined[symbol] = version.lstrip("@")
            else:
                defined.add(symbol)
    needed = {name for name in needed - own if NVIDIA.match(name)}
    runtime = next((name for name in needed if name.startswith("libcudart.")), None)
    if runtime is None:
        raise SimulationError(
            f"the libraries in {folder} do not need libcudart: this torch is not supported on simulated GPUs"
        )

    outside = {symbol: version for symbol, version in undefined.items() if symbol not in defined}
    cuda = {symbol for symbol in outside if CUDA.match(symbol) and not symbol.startswith("cuFile")}
    stubs: dict[str, dict[str, str]] = {name: {} for name in sorted(needed - {runtime, "libcuda.so.1"})}
    for symbol in sorted(outside.keys() - cuda):
        prefix = next((library for start, library in PREFIXES if symbol.startswith(start)), None)
        name = next((name for name in stubs if prefix and name.startswith(prefix + ".so")), None)
        if name is not None:
            stubs[name][symbol] = outside[symbol]
    return Wanted(_first_place(folder, paths), runtime, frozenset(cuda), stubs)


def _first_place(folder: Path, paths: list[str]) -> Path:
    """Return the CUDA runtime's folder if torch searches it, else its first NVIDIA folder, else torch's own folder."""
    places = [path for path in paths if "nvidia" in path]
    runtime = [path for path in places if re.search(r"cuda_runtime|cu\d+/lib", path)]
    chosen = (runtime or places or ["$ORIGIN"])[0]
    return Path(os.path.normpath(chosen.replace("$ORIGIN", str(folder))))


def _output(tool: str, option: str, library: Path) -> list[str]:
    variables = os.environ | {"LC_ALL": "C"}
    done = subprocess.run([tool, option, library], capture_output=True, text=True, errors="replace", env=variables)
    if done.returncode:
        raise SimulationError(f"{tool} could not read {library}: {done.stderr.strip()[:300]}")
    return [line for line in done.stdout.splitlines() if line.strip()]
