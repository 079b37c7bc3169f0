"""Real SGLang on simulated GPUs: an environment for child processes, and the folders that it needs.

SGLang pins its own torch and gigabytes of kernels, so it is never installed into the test environment. On first use
its wheels go into the user's cache, next to the simulated GPUs, with exactly the packages that its modules import on a
machine without a GPU (requirements.txt). Measured on two cores: 50 s for 0.5.23 (0.3 GB to download, 1.1 GB on disk),
3 s for the older release, which shares the newer release's dependencies.

A process in this environment sees N simulated GPUs. For SGLang, which would look for missing kernels, CUDA is reported
as unavailable (no_kernels.py). All caches lie in a folder of the test.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from devguard.simgpu import cached, overlay, wheels
from devguard.simgpu.progress import Reporter
from tests.helpers.simulated import sim_environment

__all__ = ["NEWEST", "OLDEST", "POSSIBLE", "prepare", "sglang_environment"]

NEWEST = "0.5.23"
OLDEST = "0.4.6.post2"  # The last release with the bug of SGLang issue 5732.
POSSIBLE = sys.version_info >= (3, 11)  # Required by SGLang 0.5.23.

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
SITE = HERE / "site"  # Declares the entry point of no_kernels.py.


@functools.cache
def prepare(release: str = NEWEST) -> tuple[Path, ...]:
    """Return the folders of a release of SGLang for PYTHONPATH; make them if they do not exist.

    Raises
    ------
    SimulationError
        If the folders cannot be made here; the message gives the reason.
    """
    newest = _folder(f"sglang-{NEWEST}", ["-r", str(REQUIREMENTS)], REQUIREMENTS.read_bytes(), 1_200_000_000)
    if release == NEWEST:
        return (newest,)
    return (_folder(f"sglang-{release}", [f"sglang=={release}"], b"", 8_000_000), newest)


def _folder(name: str, requirements: list[str], text: bytes, size: int) -> Path:
    report = Reporter(True)
    tag = f"{sys.implementation.cache_tag}{sys.abiflags}-{hashlib.sha256(text).hexdigest()[:12]}"

    def fill(stage: Path) -> None:
        scratch = stage / "scratch"
        scratch.mkdir()
        report.say(f"installing {name} for the tests")
        with report.steps():
            wheels.install(
                ["--no-compile", *requirements],  # Compiling everything takes longer than the download.
                stage / "site",
                dependencies=False,
                scratch=scratch,
                text=name,
                expected=size,
                report=report,
            )
        for left in sorted(scratch.rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        scratch.rmdir()

    return cached.get(overlay.cache_folder().parent / "sglang", f"{name}-{tag}", fill, report) / "site"


def sglang_environment(
    gpus: int = 2, *, release: str = NEWEST, folder: str | os.PathLike[str] | None = None, **options: Any
) -> dict[str, str]:
    """Return the environment of a Python process that can run SGLang on simulated GPUs.

    Parameters
    ----------
    gpus : int
        The number of GPUs.
    release : str
        `NEWEST` or `OLDEST`.
    folder : path, optional
        The folder for state files, logs and every cache; a new temporary folder by default.
    **options
        Options of `devguard.simgpu.environment`.
    """
    place = Path(tempfile.mkdtemp(prefix="devguard-sglang-", dir=folder))
    base = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "DEVGUARD"))}
    base |= {name: value for name, value in os.environ.items() if name == "DEVGUARD_CACHE_DIR"}
    base["PYTHONPATH"] = os.pathsep.join(map(str, (SITE, *prepare(release))))
    base |= {
        "HF_HOME": str(place / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_CACHE_DIR": str(place / "sglang"),
        "SGLANG_JIT_CACHE_DIR": str(place / "jit"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
        "XDG_CACHE_HOME": str(place / "cache"),
        # The simulated NCCL reports a version to any caller; SGLang would then use it.
        "SGLANG_NCCL_SO_PATH": str(place / "no-such-library.so"),
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile opens contexts on GPU 0.
        # Every process imports much of SGLang, so its bytecode is kept, but outside the folder of the wheels.
        "PYTHONPYCACHEPREFIX": str(overlay.cache_folder().parent / "sglang" / "bytecode"),
    }
    base.pop("PYTHONDONTWRITEBYTECODE", None)
    return sim_environment(gpus, folder=place, base=base, **options)
