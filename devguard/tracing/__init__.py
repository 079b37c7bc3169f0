"""Report each CUDA context of a program as it is opened: ``devguard run --trace-contexts``.

`environment` returns the environment that makes a child process report its contexts: device, process, thread, library,
C call and Python stack. A library for LD_PRELOAD (csrc/) interposes the driver's functions, so contexts that no Python
call explains are reported too. It guards nothing and changes no device. Needs Linux with glibc, and a C compiler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from devguard.errors import TracingError

__all__ = ["environment", "TracingError"]


def environment(
    output: str | os.PathLike[str] | None = None,
    *,
    json: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the complete environment for a child process that reports its contexts and those of its children.

    The first call compiles a small library into the user's cache (a second or two); later calls reuse it.

    Parameters
    ----------
    output : path, optional
        The file to which records are appended; the default is the standard error of the process that opens a context.
    json : bool
        Write one JSON object a line for each context, instead of text.
    base : mapping, optional
        The environment to start from, ``os.environ`` by default. Libraries that it preloads stay preloaded.

    Returns
    -------
    dict of str to str
        To be passed as ``env`` to `subprocess.run` and similar functions.

    Raises
    ------
    TracingError
        If contexts cannot be traced here; the message gives the reason and the remedy.
    """
    from devguard.tracing.library import library

    result = dict(os.environ if base is None else base)
    ours = str(library())
    others = [word for word in result.get("LD_PRELOAD", "").replace(" ", ":").split(":") if word and word != ours]
    result["LD_PRELOAD"] = ":".join([ours, *others])
    for name in ("DEVGUARD_TRACE_OUTPUT", "DEVGUARD_TRACE_FORMAT"):
        result.pop(name, None)
    if output is not None:
        result["DEVGUARD_TRACE_OUTPUT"] = _writable(os.path.abspath(output))
    if json:
        result["DEVGUARD_TRACE_FORMAT"] = "json"
    return result


def _writable(path: str) -> str:
    """Check that records can be appended to `path`, because the preloaded library reports no errors; return `path`."""
    try:
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)):
            return path
    except OSError as error:
        raise TracingError(f"cannot write records to {path}: {error.strerror}") from error
