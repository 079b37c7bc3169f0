"""Real SGLang on simulated GPUs: an environment for child processes, and the folders that it needs.

SGLang pins a torch of its own and gigabytes of kernels, so it is never installed into the test environment. On first
use its wheels go into a folder of the user's cache, next to the simulated GPUs, with exactly what its modules import on
a machine without a GPU (requirements.txt). Seen on two cores: 50 s for 0.5.23 (0.3 GB to download, 1.1 GB on disk), 3 s
for the older release, which shares the newer one's dependencies.

A process in this environment sees N simulated GPUs, and SGLang, which would look for kernels that are not there, is
told that there are none (no_kernels.py). Every cache of theirs lies in a folder of the test's own.
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
OLDEST = "0.4.6.post2"  # the last release with the bug of issue 5732
POSSIBLE = sys.version_info >= (3, 11)  # what SGLang 0.5.23 asks for

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
SITE = HERE / "site"  # has no_kernels.py's entry point


@functools.cache
def prepare(release: str = NEWEST) -> tuple[Path, ...]:
    """What goes on PYTHONPATH for a release of SGLang; its folders are made if they are not there.

    Raises
    ------
    SimulationError
        They cannot be had here; the message says why.
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
                ["--no-compile", *requirements],  # compiling all of it takes longer than the download
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
    """The environment of a Python that can run SGLang on simulated GPUs.

    Parameters
    ----------
    gpus : int
        How many.
    release : str
        `NEWEST` or `OLDEST`.
    folder : path, optional
        Where state files, logs and every cache go; a fresh temporary folder by default.
    **options
        Those of `devguard.simgpu.environment`.
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
        # the simulated NCCL answers anything that asks it for its version; SGLang would then use it
        "SGLANG_NCCL_SO_PATH": str(place / "no-such-library.so"),
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile opens contexts on GPU 0 by itself
        # every process imports much of SGLang: so it is compiled once; the folder of its wheels stays as it is
        "PYTHONPYCACHEPREFIX": str(overlay.cache_folder().parent / "sglang" / "bytecode"),
    }
    base.pop("PYTHONDONTWRITEBYTECODE", None)
    return sim_environment(gpus, folder=place, base=base, **options)
