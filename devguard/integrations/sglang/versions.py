"""The releases of SGLang that devguard knows, and the one that is installed."""

from __future__ import annotations

import importlib.metadata
import re

from devguard.errors import DevGuardError

__all__ = ["check", "installed", "NEWEST", "OLDEST", "parse", "UnsupportedVersionError"]

# Read and run: 0.4.6.post2 and 0.5.23. In between, functions and arguments are found by name, or left alone.
OLDEST = "0.4.6"
NEWEST = "0.5.23"


class UnsupportedVersionError(DevGuardError):
    """The installed SGLang is not one of the releases that devguard knows."""


def installed() -> str | None:
    """Return the version of the installed SGLang, None if there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(version: str) -> tuple[int, int, int, int]:
    """Return the numbers of a version; the last one is that of the post-release, -1 for what comes before a release.

    Raises
    ------
    UnsupportedVersionError
        If it is no version.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.post(\d+))?(\.?(?:dev|rc|a|b)\d*)?", version)
    if found is None:
        raise UnsupportedVersionError(f"SGLang says that its version is {version!r}, which devguard cannot read.")
    major, minor, micro, post = (int(number or 0) for number in found.groups()[:4])
    return major, minor, micro, -1 if found[5] and not post else post


def check(version: str | None = None) -> str:
    """Return the version of SGLang, that of the installed one by default.

    Raises
    ------
    UnsupportedVersionError
        If there is none, or if it is older or newer than what devguard knows.
    """
    version = version or installed()
    if version is None:
        raise UnsupportedVersionError("SGLang is not installed here.")
    if not parse(OLDEST)[:3] <= parse(version)[:3] <= parse(NEWEST)[:3]:
        raise UnsupportedVersionError(
            f"devguard knows the processes of SGLang {OLDEST} to {NEWEST}, and this is {version}. Name the owner of "
            'each worker yourself: @devguard.guard(argument="gpu_id"), or DEVGUARD_DEVICE for each process.'
        )
    return version
