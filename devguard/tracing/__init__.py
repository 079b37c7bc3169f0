"""Tells who opened each CUDA context of a program, as it happens: ``devguard run --trace-contexts``.

`environment` gives the environment of a child process whose contexts are reported: device, process, thread, the library
and the C call, and the Python stack. It interposes the driver's functions with LD_PRELOAD (csrc/), so it shows contexts
that no Python call explains, too; it guards nothing and changes no device. Linux with glibc only, with a C compiler.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from devguard.errors import TracingError

__all__ = ["TracingError", "environment"]


def environment(
    output: str | os.PathLike[str] | None = None,
    *,
    json: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The complete environment for a child process whose contexts are reported, and those of its own children.

    The first call compiles a small library into the user's cache (a second or two); later calls reuse it.

    Parameters
    ----------
    output : path, optional
        The file that records are appended to; by default they go to the standard error of whoever opens a context.
    json : bool
        One JSON object a line for each context, in place of text.
    base : mapping, optional
        The environment to start from, ``os.environ`` by default. What it preloads already stays preloaded.

    Returns
    -------
    dict of str to str
        Pass it as ``env`` to `subprocess.run` and the like.

    Raises
    ------
    TracingError
        Contexts cannot be traced here; the message says why, and what to do.
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
    """Make sure now that records can be appended: the library itself says nothing if they cannot."""
    try:
        with open(path, "ab"):
            return path
    except OSError as error:
        raise TracingError(f"the records cannot be written to {path}: {error.strerror}") from error
