"""Installs wheels into devguard's own folders with the environment's pip, and explains failures.

The user's pip configuration is honoured, except for settings that would make pip install elsewhere. This module
resolves no versions: each call names the exact requirements.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from devguard.errors import SimulationError
from devguard.simgpu.progress import Reporter

__all__ = ["install", "installed_torch", "missing_requirements"]

# Options of pip that would keep it from installing into the given folder, and of Python that would run other code.
NEUTRAL = {
    "PYTHONSAFEPATH": "1",
    "PIP_USER": "0",
    "PIP_REQUIRE_VIRTUALENV": "0",
    "PIP_DRY_RUN": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_QUIET": "0",  # otherwise pip does not say why it fails
}
DROPPED = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PIP_REQUIREMENT", "PYTHONPATH")
# Packages that the simulation replaces, or that need a compiler for real GPUs.
SIMULATED = re.compile(r"(nvidia|cuda|triton|pytorch-triton)(-|$)")
NETWORK = (
    "Connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "timed out",
    "Max retries exceeded",
    "ProxyError",
    "SSLError",
)
BROKEN = (
    "IncompleteRead",
    "incomplete-download",
    "DO NOT MATCH THE HASHES",
    "has an invalid wheel",
    "BadZipFile",
    "is invalid",
)


def installed_torch() -> str | None:
    """Return the version of torch in this Python environment, without its local part; None if there is no torch."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_requirements(site: Path) -> list[str]:
    """Return the requirements of the torch in a folder that this environment lacks and the simulation does not replace.

    Parameters
    ----------
    site : Path
        The folder that contains torch.

    Returns
    -------
    list of str
        Requirements for pip, which evaluates their markers.
    """
    torch = next(iter(importlib.metadata.distributions(name="torch", path=[str(site)])))
    missing = []
    for requirement in torch.requires or []:
        words = re.match(r"[A-Za-z0-9._-]+", requirement)
        name = words[0] if words else ""
        if SIMULATED.match(re.sub(r"[-_.]+", "-", name).lower()) or "extra ==" in requirement:
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return sorted(missing)


def install(
    requirements: Sequence[str],
    target: Path,
    *,
    dependencies: bool,
    scratch: Path,
    text: str,
    expected: int,
    report: Reporter,
) -> None:
    """Install wheels into a folder.

    Parameters
    ----------
    requirements : sequence of str
        Arguments for pip.
    target : Path
        The folder.
    dependencies : bool
        Whether to install the wheels' own requirements, too.
    scratch : Path
        A folder for pip's temporary files and its output, on the same disk as the target.
    text : str
        The name of this step, for the report.
    expected : int
        The approximate number of bytes that pip writes.
    report : Reporter
        Shows the progress.

    Raises
    ------
    SimulationError
        If pip fails; with the reason, as far as pip's output shows it.
    """
    command = [*_pip(), "install", "--only-binary=:all:", "--target", str(target), "--progress-bar", "off"]
    if not dependencies:
        command.append("--no-deps")
    variables = {name: value for name, value in os.environ.items() if name not in DROPPED}
    temporary = scratch / "tmp"
    temporary.mkdir(exist_ok=True)
    variables |= NEUTRAL | {"TMPDIR": str(temporary)}
    output = scratch / "pip.log"
    with open(output, "wb") as log:
        process = subprocess.Popen(
            [*command, *requirements],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
        )
        try:
            status = report.run(process, text, scratch, expected)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if status:
        raise SimulationError(_explain(requirements, output.read_text(errors="replace")))


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    bundled = sorted(_bundled_pip())  # uv's environments have no pip, but their Python contains a copy for ensurepip.
    if bundled:
        return [sys.executable, f"{bundled[-1]}/pip", "--disable-pip-version-check"]
    raise SimulationError(
        f"{sys.executable} has no pip, which is needed to install the CUDA build of torch: install pip first "
        f"(`uv pip install pip`, or `{sys.executable} -m ensurepip`, or your system's package python3-pip)"
    )


def _bundled_pip() -> list[Path]:
    found = importlib.util.find_spec("ensurepip")
    if found is None or not found.origin:
        return []
    return list(Path(found.origin).parent.glob("_bundled/pip-*.whl"))


def _explain(requirements: Sequence[str], output: str) -> str:
    names = " ".join(requirements)
    lines = [line for line in output.splitlines() if line.strip()]
    excerpt = "\n".join(f"  pip: {line[:300]}" for line in _select_reasons(lines))
    if "No space left on device" in output or "Errno 28" in output:
        return (
            f"the disk is full: {names} could not be installed; free about 2 GB, or set DEVGUARD_CACHE_DIR to a "
            f"folder on another disk\n{excerpt}"
        )
    if any(word in output for word in BROKEN):
        return f"the download of {names} was interrupted or damaged; nothing was kept: run the command again\n{excerpt}"
    # After its last retry pip reports only that it found no version at all.
    if any(word in output for word in NETWORK) or "(from versions: none)" in output:
        return (
            f"{names} could not be downloaded: the package index cannot be reached or has no such package; check the "
            "network, and pip's index-url and proxy settings (`pip config list`), and run the command again\n"
            f"{excerpt}"
        )
    if "No matching distribution" in output:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"the package index that pip uses has no {names} for Python {version} on Linux x86-64; use an index with "
            "CUDA builds, such as PyPI (`pip config list` shows the current one), or another version with --torch\n"
            f"{excerpt}"
        )
    return f"pip could not install {names}; fix the problem that pip reports, and run the command again\n{excerpt}"


def _select_reasons(lines: list[str]) -> list[str]:
    """Return the lines of pip's output that say why it failed: its errors, and the last warning before them."""
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    # While it retries, pip names the cause in warnings, and at the end only that it found no version.
    warnings = [line for line in lines if line.startswith("WARNING") and any(word in line for word in NETWORK)]
    return [*dict.fromkeys([*warnings[-1:], *errors[-4:]])]
