"""Builds and finds the overlay: a folder with the CUDA build of torch and the simulated libraries.

An overlay is complete or does not exist (cached.py). Nothing is written outside the cache folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu import cached, native, wheels
from devguard.simgpu.progress import Reporter
from devguard.support import compiler, user_cache
from devguard.support.installed_torch import TORCH_MINIMUM

__all__ = ["cache_folder", "DEFAULT_TORCH", "Overlay", "prepare"]

DEFAULT_TORCH = "2.13.0"
COMPILED = "simulation.json"  # the list of the files that are compiled here, and not part of torch
NEEDED_BYTES = 2_500_000_000  # a wheel of 0.5 to 0.9 GB and its unpacked contents at the same time


@dataclasses.dataclass(frozen=True)
class Overlay:
    """A ready overlay.

    Attributes
    ----------
    folder : Path
        The whole overlay.
    torch : str
        The version of torch in it.
    needs : Path or None
        A further folder with the requirements of torch that the environment lacks.
    """

    folder: Path
    torch: str
    needs: Path | None = None

    @property
    def python_path(self) -> tuple[Path, ...]:
        """The folders that go first on PYTHONPATH."""
        return (self.folder / "site", *([self.needs / "site"] if self.needs else []))

    @property
    def driver_folder(self) -> Path:
        """The folder that goes first on LD_LIBRARY_PATH."""
        return self.folder / "driver"


def cache_folder() -> Path:
    """Return the folder of all overlays: ``$DEVGUARD_CACHE_DIR/simgpu``, or a folder in the user's cache."""
    folder = user_cache.locate("simgpu", SimulationError)
    if any(mark in str(folder) for mark in ":;$"):  # PYTHONPATH and LD_LIBRARY_PATH would name other folders.
        raise SimulationError(
            f"search paths cannot name {folder} because of a colon, a semicolon or a dollar sign: set "
            "DEVGUARD_CACHE_DIR to another folder"
        )
    return folder


def prepare(torch: str | None = None, *, progress: bool = True) -> Overlay:
    """Return the overlay for a version of torch, which is built first if necessary.

    Parameters
    ----------
    torch : str, optional
        The version. By default the version in this environment, or `DEFAULT_TORCH` if it has none.
    progress : bool
        Report progress on standard error.

    Raises
    ------
    SimulationError
        If the overlay cannot be built here. Nothing incomplete is left.
    """
    _check_platform()
    version = _version(torch)
    report = Reporter(progress)
    tag = f"{sys.implementation.cache_tag}{sys.abiflags}"
    name = f"torch-{version}-{tag}-{_source_hash()}"
    root = cache_folder()
    folder = cached.get(root, name, lambda stage: _fill_torch(stage, version, tag, report), report)
    missing = wheels.missing_requirements(folder / "site")
    if not missing:
        return Overlay(folder, version)
    digest = hashlib.sha256("\n".join(missing).encode()).hexdigest()[:12]
    needs = cached.get(root, f"needs-{tag}-{digest}", lambda stage: _fill_needs(stage, missing, report), report)
    return Overlay(folder, version, needs)


def _check_platform() -> None:
    here = f"{sys.platform} on {platform.machine()}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SimulationError(f"simulated GPUs need Linux on x86-64, and this is {here}")
    if sys.implementation.name != "cpython" or sys.maxsize <= 2**32:
        raise SimulationError("simulated GPUs need a 64-bit CPython, as torch itself does")
    if platform.libc_ver()[0] != "glibc":
        raise SimulationError("simulated GPUs need glibc, as torch's wheels do; this system has another C library")


def _version(torch: str | None) -> str:
    version = (torch or wheels.installed_torch() or DEFAULT_TORCH).partition("+")[0]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not re.fullmatch(r"[0-9A-Za-z.]+", version):
        raise SimulationError(f"{torch!r} is not a version of torch (--torch): give a version such as {DEFAULT_TORCH}")
    if (int(numbers[1]), int(numbers[2])) < TORCH_MINIMUM:
        oldest = ".".join(map(str, TORCH_MINIMUM))
        raise SimulationError(
            f"torch {version} is too old for simulated GPUs: {oldest} is the oldest, {DEFAULT_TORCH} the default"
        )
    return version


def _source_hash() -> str:
    digest = hashlib.sha256(f"format {cached.FORMAT}".encode())
    scripts = [Path(__file__).with_name(name) for name in ("native.py", "stubs.py", "symbols.py")]
    for source in (*sorted(native.SOURCES.glob("*.[ch]")), compiler.HEADER, *scripts):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


# ---- the contents of the folders


def _fill_torch(stage: Path, version: str, tag: str, report: Reporter) -> None:
    native.compiler()  # A missing compiler must be reported before the download.
    site, scratch = stage / "site", stage / "scratch"
    scratch.mkdir()
    with report.steps():
        earlier = _same_torch(stage.parent, version, tag)
        if earlier is not None:
            report.say(f"recompiling the simulated GPUs for torch {version}")
            shutil.copytree(earlier / "site", site, copy_function=os.link, symlinks=True)
            for name in _compiled_files(earlier):
                (stage / name).unlink(missing_ok=True)
        else:
            _check_space(stage)
            report.say(
                f"building simulated GPUs for torch {version} in {stage.parent} (once; the CUDA build of torch is a "
                "download of 0.5 to 0.9 GB, and takes 1.3 to 1.8 GB on disk)"
            )
            text = f"torch {version}, CUDA build: downloading, unpacking"
            requirement = f"torch==={version}"  # With ==, pip would prefer a local +cpu wheel if one is configured.
            wheels.install(
                [requirement],
                site,
                dependencies=False,
                scratch=scratch,
                text=text,
                expected=1_900_000_000,
                report=report,
            )
        before = {name for name, _ in cached.files(stage)}
        cuda = native.cuda_version(site)
        headers = _headers(scratch, cuda, report)
        report.say(f"compiling the simulated CUDA {cuda} libraries")
        native.build(site, headers, stage / "driver", scratch)
    shutil.rmtree(scratch)
    made = sorted({name for name, _ in cached.files(stage)} - before)
    (stage / COMPILED).write_text(json.dumps(made), encoding="utf-8")


def _fill_needs(stage: Path, missing: list[str], report: Reporter) -> None:
    scratch = stage / "scratch"
    scratch.mkdir()
    (stage / "site").mkdir()
    with report.steps():
        wheels.install(
            missing,
            stage / "site",
            dependencies=True,
            scratch=scratch,
            text="requirements of torch that this environment lacks",
            expected=80_000_000,
            report=report,
        )
    shutil.rmtree(scratch)


def _same_torch(root: Path, version: str, tag: str) -> Path | None:
    """Return a complete overlay with the same torch and another simulation, to share its files, or None."""
    for folder in sorted(root.glob(f"torch-{version}-{tag}-*")):
        is_candidate = ".building-" not in folder.name and not folder.name.endswith(".lock")
        if is_candidate and cached.whole(folder) and _compiled_files(folder):
            return folder
    return None


def _compiled_files(folder: Path) -> set[str]:
    """Return the files of an overlay that its simulation compiled; empty if its list of them is damaged."""
    try:
        listed = set(json.loads((folder / COMPILED).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return set()
    return listed if listed <= {name for name, _ in cached.files(folder)} else set()


def _headers(scratch: Path, cuda: str, report: Reporter) -> list[Path]:
    """Download NVIDIA's headers from their own packages. They are used to compile, and not kept."""
    major = int(cuda.partition(".")[0])
    runtime, crt = f"nvidia-cuda-runtime=={cuda}.*", f"nvidia-cuda-crt=={cuda}.*"
    if major < 13:
        # CUDA 12 has crt/host_defines.h, a few macros, only in a package of 40 MB; the header of CUDA 13 works as well.
        runtime, crt = f"nvidia-cuda-runtime-cu{major}=={cuda}.*", "nvidia-cuda-crt==13.*"
    wheels.install(
        [runtime, crt],
        scratch / "headers",
        dependencies=False,
        scratch=scratch,
        text=f"headers of CUDA {cuda}",
        expected=6_000_000,
        report=report,
    )
    found = []
    for name in ("cuda.h", "crt/host_defines.h"):
        place = next(iter(sorted((scratch / "headers").rglob(name))), None)
        if place is None:
            raise SimulationError(
                f"NVIDIA's header packages for CUDA {cuda} have no {name}; try another version with --torch"
            )
        found.append(place.parents[name.count("/")])
    return found


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise SimulationError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and building simulated GPUs takes about "
            f"{NEEDED_BYTES / 1e9:.1f} GB: free some space, or set DEVGUARD_CACHE_DIR to a folder on another disk"
        )
