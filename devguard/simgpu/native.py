"""Compiles the simulated CUDA libraries for one installed CUDA build of torch.

csrc/*.c becomes libcudart. Every other NVIDIA library that torch's libraries need becomes a stub with the required
symbols: functions that do nothing and report success. Libraries of other vendors are not touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu.stubs import stub_source
from devguard.simgpu.symbols import Wanted, wanted
from devguard.support import compiler as c_compiler

__all__ = ["build", "compiler", "cuda_version", "SOURCES"]

SOURCES = Path(__file__).parent / "csrc"
# No warning about unused parameters, because the simulation does not need every argument of CUDA's functions.
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


def compiler() -> str:
    """Return the C compiler: ``$CC``, or cc, gcc or clang.

    Raises
    ------
    SimulationError
        If there is no compiler, or if readelf or nm, which come with it, are missing.
    """
    return c_compiler.find("simulated GPUs", SimulationError, tools=("readelf", "nm"))


def cuda_version(site: Path) -> str:
    """Return the CUDA version, such as ``"13.0"``, of the torch in a folder.

    Raises
    ------
    SimulationError
        If that torch is not a CUDA build.
    """
    text = (site / "torch" / "version.py").read_text(encoding="utf-8")
    found = re.search(r"""^cuda\b.*=\s*['"](\d+\.\d+)""", text, re.MULTILINE)
    if found is None or not (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        raise SimulationError(
            "the torch that pip installed is not a CUDA build: use a package index with CUDA builds, such as PyPI "
            "(`pip config list` shows the current one)"
        )
    return found[1]


def build(site: Path, headers: Sequence[Path], driver: Path, scratch: Path) -> None:
    """Put the simulated libraries where the torch in ``site`` looks for NVIDIA's.

    Parameters
    ----------
    site : Path
        The folder that contains torch.
    headers : sequence of Path
        The folders of cuda.h, in the version of torch's CUDA, and of the headers that it includes.
    driver : Path
        The folder for libcuda.so.1 and libnvidia-ml.so.1, for LD_LIBRARY_PATH. It contains nothing else.
    scratch : Path
        A folder for intermediate files.
    """
    cc = compiler()
    required = wanted(site / "torch" / "lib")
    libraries = required.folder
    libraries.mkdir(parents=True, exist_ok=True)
    driver.mkdir(parents=True, exist_ok=True)

    includes = [word for folder in headers for word in ("-I", str(folder))]
    objects = []
    for source in sorted(SOURCES.glob("*.c")):
        target = scratch / f"{source.stem}.o"
        _run([cc, *FLAGS, *includes, "-c", str(source), "-o", str(target)])
        objects.append(target)
    _runtime(cc, required, objects, libraries, scratch)
    runtime = str(libraries / required.runtime)
    for folder in (driver, libraries):
        relative = os.path.relpath(libraries, folder)
        for name in DRIVER_LIBRARIES:
            extra = [runtime, f"-Wl,-rpath,$ORIGIN/{relative}"]
            _library(cc, name, "", "{ global: *; };", folder / name, scratch, extra)
    for name, symbols in required.stubs.items():
        versions = sorted({version for version in symbols.values() if version})
        nodes = [f"{version} {{ {'' if i else 'global: *;'} }};" for i, version in enumerate(versions)]
        script = "\n".join(nodes) or "{ global: *; };"
        _library(cc, name, stub_source(name, symbols), script, libraries / name, scratch)


def _runtime(cc: str, required: Wanted, objects: Sequence[Path], libraries: Path, scratch: Path) -> None:
    """Link libcudart, with a function that returns "not supported" for each symbol that csrc lacks."""
    defined = set()
    for line in _run(["nm", *map(str, objects)]).splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] == "T":
            defined.add(fields[2])
    rest = "".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(required.cuda - defined))
    source, script = scratch / "unsupported.c", scratch / "runtime.map"
    source.write_text(rest or "typedef int nothing;\n", encoding="ascii")
    script.write_text(
        f"{required.runtime} {{ global: cuda*; __cuda*; }};\nDEVGUARD_SIM {{ global: cu[A-Z]*; nvml*; local: *; }};\n",
        encoding="ascii",
    )
    command = [cc, "-shared", "-fPIC", "-w", f"-Wl,-soname,{required.runtime}", f"-Wl,--version-script={script}"]
    _run([*command, "-o", str(libraries / required.runtime), *map(str, objects), str(source), "-lpthread"])


def _library(
    cc: str, name: str, text: str, script: str, output: Path, scratch: Path, extra: Iterable[str] = ()
) -> None:
    source, versions = scratch / "stub.c", scratch / "stub.map"
    source.write_text(text, encoding="ascii")
    versions.write_text(script, encoding="ascii")
    command = [cc, "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
    _run([*command, "-Wl,--no-as-needed", "-o", str(output), str(source), *extra])


def _run(command: Sequence[str]) -> str:
    return c_compiler.run(command, "the simulation's C source", SimulationError)
