"""Compiles the simulated CUDA libraries for one installed CUDA build of torch.

libcudart is csrc/*.c. Every other NVIDIA library that torch's own libraries need becomes a stub that defines the very
symbols they ask it for: functions that do nothing and report success. It never touches libraries that are not
NVIDIA's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu.stubs import stub_source
from devguard.simgpu.symbols import Wanted, wanted
from devguard.support import compiler

__all__ = ["SOURCES", "build", "cuda_version", "find_compiler"]

SOURCES = Path(__file__).parent / "csrc"
# nvcc's own warnings apart: the simulation implements functions whose arguments it does not need
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
)
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")


def find_compiler() -> str:
    """The C compiler: ``$CC``, or cc, gcc or clang.

    Raises
    ------
    SimulationError
        There is none, or readelf and nm, which come with one, are missing.
    """
    return compiler.compiler("simulated GPUs", SimulationError, tools=("readelf", "nm"))


def cuda_version(site: Path) -> str:
    """The CUDA version, such as ``"13.0"``, that the torch in a folder was built for.

    Raises
    ------
    SimulationError
        It is no CUDA build.
    """
    text = (site / "torch" / "version.py").read_text(encoding="utf-8")
    found = re.search(r"""^cuda\b.*=\s*['"](\d+\.\d+)""", text, re.MULTILINE)
    if found is None or not (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        raise SimulationError(
            "the torch that pip fetched is no CUDA build: its package index must be one that carries the "
            "CUDA build, as PyPI does "
            "(`pip config list` shows which it is)"
        )
    return found[1]


def build(site: Path, headers: Sequence[Path], driver: Path, scratch: Path) -> None:
    """Put the simulated libraries where the torch in ``site`` looks for NVIDIA's.

    Parameters
    ----------
    site : Path
        The folder that torch was installed into.
    headers : sequence of Path
        The folders to search for cuda.h, of the same version as torch's CUDA, and what it includes.
    driver : Path
        Where libcuda.so.1 and libnvidia-ml.so.1 go, for LD_LIBRARY_PATH: nothing else is in that folder.
    scratch : Path
        A folder for intermediate files.
    """
    cc = find_compiler()
    asked = wanted(site / "torch" / "lib")
    libraries = asked.folder
    libraries.mkdir(parents=True, exist_ok=True)
    driver.mkdir(parents=True, exist_ok=True)

    includes = [word for folder in headers for word in ("-I", str(folder))]
    objects = []
    for source in sorted(SOURCES.glob("*.c")):
        target = scratch / f"{source.stem}.o"
        _run([cc, *FLAGS, *includes, "-c", str(source), "-o", str(target)])
        objects.append(target)
    _runtime(cc, asked, objects, libraries, scratch)
    runtime = str(libraries / asked.runtime)
    for folder in (driver, libraries):
        relative = os.path.relpath(libraries, folder)
        for name in DRIVER_LIBRARIES:
            extra = [runtime, f"-Wl,-rpath,$ORIGIN/{relative}"]
            _library(cc, name, "", "{ global: *; };", folder / name, scratch, extra)
    for name, symbols in asked.stubs.items():
        versions = sorted({version for version in symbols.values() if version})
        nodes = [f"{version} {{ {'' if i else 'global: *;'} }};" for i, version in enumerate(versions)]
        script = "\n".join(nodes) or "{ global: *; };"
        _library(cc, name, stub_source(name, symbols), script, libraries / name, scratch)


def _runtime(cc: str, asked: Wanted, objects: Sequence[Path], libraries: Path, scratch: Path) -> None:
    """Link libcudart, with a function that answers "not supported" for each one that csrc does not have."""
    defined = set()
    for line in _run(["nm", *map(str, objects)]).splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] == "T":
            defined.add(fields[2])
    rest = "".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(asked.cuda - defined))
    source, script = scratch / "unsupported.c", scratch / "runtime.map"
    source.write_text(rest or "typedef int nothing;\n", encoding="ascii")
    script.write_text(
        f"{asked.runtime} {{ global: cuda*; __cuda*; }};\nDEVGUARD_SIM {{ global: cu[A-Z]*; nvml*; local: *; }};\n",
        encoding="ascii",
    )
    command = [cc, "-shared", "-fPIC", "-w", f"-Wl,-soname,{asked.runtime}", f"-Wl,--version-script={script}"]
    _run([*command, "-o", str(libraries / asked.runtime), *map(str, objects), str(source), "-lpthread"])


def _library(
    cc: str, name: str, text: str, script: str, output: Path, scratch: Path, extra: Iterable[str] = ()
) -> None:
    source, versions = scratch / "stub.c", scratch / "stub.map"
    source.write_text(text, encoding="ascii")
    versions.write_text(script, encoding="ascii")
    command = [cc, "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
    _run([*command, "-Wl,--no-as-needed", "-o", str(output), str(source), *extra])


def _run(command: Sequence[str]) -> str:
    return compiler.run(command, "the simulation's C source", SimulationError)
