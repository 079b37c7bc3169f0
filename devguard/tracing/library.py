"""Compiles the library that is preloaded into traced processes, once for each version of its source.

It is built under a temporary name in the user's cache and then renamed, so that a half-made one is never loaded and two
processes may build at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

from devguard import compiling
from devguard.errors import TracingError

__all__ = ["FLAGS", "library", "SOURCES"]

SOURCES = Path(__file__).parent / "csrc"
# driver.c needs -O2: dlsym must reach the real one by a tail call
FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-shared")
LIBRARIES = ("-ldl", "-lpthread")
MACHINES = ("x86_64", "aarch64")


def library() -> Path:
    """Find the library, and compile it if there is none.

    Raises
    ------
    TracingError
        It cannot be had here; nothing half-made is left.
    """
    _check_platform()
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(f"{platform.machine()} {FLAGS}".encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    target = _folder() / f"libdevguard-trace-{digest.hexdigest()[:12]}.so"
    if any(mark in str(target) for mark in " :"):
        raise TracingError(
            f"LD_PRELOAD cannot name {target}, because of a space or a colon: name another folder in DEVGUARD_CACHE_DIR"
        )
    if not target.exists():
        try:
            _build([str(source) for source in sources if source.suffix == ".c"], target)
        except OSError as error:
            raise TracingError(
                f"{target} cannot be made: {error.strerror}; name a folder that can be written in DEVGUARD_CACHE_DIR"
            ) from error
    return target


def _check_platform() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES or platform.libc_ver()[0] != "glibc":
        raise TracingError(
            f"contexts are traced on Linux with glibc on {' and '.join(MACHINES)} only, and this is {sys.platform} on "
            f"{machine}"
        )


def _folder() -> Path:
    """The user's cache folder; where overlays of simulated GPUs are, one level up."""
    named = os.environ.get("DEVGUARD_CACHE_DIR")
    if named:
        return Path(os.path.abspath(named)) / "tracing"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "devguard" / "tracing"


def _build(sources: list[str], target: Path) -> None:
    cc = compiling.compiler("traced contexts", TracingError)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        command = [cc, *FLAGS, "-o", scratch, *sources, *LIBRARIES]
        compiling.run(command, "the source of the context tracer", TracingError)
        os.chmod(scratch, 0o755)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
