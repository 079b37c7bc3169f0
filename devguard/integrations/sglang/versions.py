"""The releases of SGLang that devguard supports, and the installed release."""

from __future__ import annotations

import importlib.metadata
import re

from devguard.errors import DevGuardError

__all__ = ["check", "installed", "NEWEST", "OLDEST", "parse", "UnsupportedVersionError"]

# 0.4.6.post2 and 0.5.23 were read and run. Releases in between: functions and arguments are found by name or ignored.
OLDEST = "0.4.6"
NEWEST = "0.5.23"


class UnsupportedVersionError(DevGuardError):
    """devguard does not support the installed release of SGLang."""


def installed() -> str | None:
    """Return the version of the installed SGLang, or None."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(version: str) -> tuple[int, int, int, int]:
    """Return a version as numbers; the last is the number of the post-release, -1 for a pre-release.

    Raises
    ------
    UnsupportedVersionError
        If `version` is not a version.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.post(\d+))?(\.?(?:dev|rc|a|b)\d*)?", version)
    if found is None:
        raise UnsupportedVersionError(f"devguard cannot parse {version!r}, the version of SGLang.")
    major, minor, micro, post = (int(number or 0) for number in found.groups()[:4])
    return major, minor, micro, -1 if found[5] and not post else post


def check(version: str | None = None) -> str:
    """Return `version`, by default that of the installed SGLang.

    Raises
    ------
    UnsupportedVersionError
        If SGLang is not installed, or is older or newer than the releases that devguard supports.
    """
    version = version or installed()
    if version is None:
        raise UnsupportedVersionError("SGLang is not installed here.")
    if not parse(OLDEST)[:3] <= parse(version)[:3] <= parse(NEWEST)[:3]:
        raise UnsupportedVersionError(
            f"devguard supports SGLang {OLDEST} to {NEWEST}, and this is {version}. Name the owner of each worker "
            'yourself: @devguard.guard(argument="gpu_id"), or DEVGUARD_DEVICE for each process.'
        )
    return version
