"""Compile the library that is preloaded into traced processes, once for each version of its source.

It is built under a temporary name in the user's cache and then renamed, so that an incomplete library is never loaded
and several processes can build at once. A library that other users can change is refused.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

from devguard.errors import TracingError
from devguard.support import compiler, user_cache

__all__ = ["FLAGS", "library", "SOURCES"]

SOURCES = Path(__file__).parent / "csrc"
# driver.c needs -O2, so that its dlsym calls the real one by a tail call.
FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-shared")
LIBRARIES = ("-ldl", "-lpthread")
MACHINES = ("x86_64", "aarch64")


def library() -> Path:
    """Return the path of the library, and compile it if it does not exist yet.

    Raises
    ------
    TracingError
        If it cannot be provided here; no incomplete file is left.
    """
    _check_platform()
    sources = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256(f"{platform.machine()} {FLAGS}".encode())
    for source in (*sources, compiler.HEADER):
        digest.update(source.name.encode() + source.read_bytes())
    target = user_cache.locate("tracing", TracingError) / f"libdevguard-trace-{digest.hexdigest()[:12]}.so"
    if any(mark in str(target) for mark in " :$"):
        raise TracingError(
            f"LD_PRELOAD cannot name {target} because of a space or a colon, or a dollar sign: set DEVGUARD_CACHE_DIR "
            "to another folder"
        )
    try:
        if not os.path.lexists(target):
            user_cache.make_folder(target.parent, TracingError)
            _build([str(source) for source in sources if source.suffix == ".c"], target)
        user_cache.check_folder(target.parent, TracingError)
        user_cache.check_file(target, TracingError)
    except OSError as error:
        raise TracingError(
            f"cannot create {target}: {error.strerror}; set DEVGUARD_CACHE_DIR to a writable folder"
        ) from error
    return target


def _check_platform() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES or platform.libc_ver()[0] != "glibc":
        raise TracingError(
            f"contexts can be traced only on Linux with glibc ({' or '.join(MACHINES)}), "
            f"not on {sys.platform} ({machine})"
        )


def _build(sources: list[str], target: Path) -> None:
    cc = compiler.find("traced contexts", TracingError)
    handle, scratch = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        command = [cc, *FLAGS, "-o", scratch, *sources, *LIBRARIES]
        compiler.run(command, "the source of the context tracer", TracingError)
        os.chmod(scratch, 0o700)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
