"""Installs wheels into folders of ours with the environment's own pip, and says clearly why that failed.

The user's pip configuration is honoured, but for what would make pip install elsewhere. It resolves nothing itself:
each call names exactly what is wanted.
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

# Options of pip's that would keep it from putting a wheel where we say.
NEUTRAL = {
    "PIP_USER": "0",
    "PIP_REQUIRE_VIRTUALENV": "0",
    "PIP_DRY_RUN": "0",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
}
DROPPED = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PIP_REQUIREMENT", "PYTHONPATH")
# What the simulation stands in for, or what needs a compiler for real GPUs.
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
    """The version of torch in this Python environment without its local part; None: it has none."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_requirements(site: Path) -> list[str]:
    """What the torch in a folder requires and this environment lacks, apart from what the simulation stands in for.

    Parameters
    ----------
    site : Path
        The folder that torch was installed into.

    Returns
    -------
    list of str
        Requirements for pip, which evaluates their markers itself.
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
        For pip's command line.
    target : Path
        The folder.
    dependencies : bool
        Install what they require, too.
    scratch : Path
        A folder for pip's temporary files and its output, on the same disk as the target.
    text, expected, report
        What to say, about how many bytes will be written, and to whom.

    Raises
    ------
    SimulationError
        With the reason as far as pip's output shows it.
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
    bundled = sorted(_bundled_pip())  # an environment made by uv has no pip, but its Python has one to install
    if bundled:
        return [sys.executable, f"{bundled[-1]}/pip", "--disable-pip-version-check"]
    raise SimulationError(
        f"{sys.executable} has no pip, which fetches the CUDA build of torch: install it first "
        f"(`uv pip install pip`, or `{sys.executable} -m ensurepip`, or your system's package python3-pip)"
    )


def _bundled_pip() -> list[Path]:
    found = importlib.util.find_spec("ensurepip")
    if found is None or not found.origin:
        return []
    return list(Path(found.origin).parent.glob("_bundled/pip-*.whl"))


def _explain(requirements: Sequence[str], output: str) -> str:
    what = " ".join(requirements)
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    said = "\n".join(f"  pip: {line[:300]}" for line in errors[-4:])
    if "No space left on device" in output or "Errno 28" in output:
        return (
            f"the disk is full: {what} could not be installed; free about 2 GB, or name another disk in "
            "DEVGUARD_CACHE_DIR"
        )
    if any(word in output for word in BROKEN):
        return f"the download of {what} broke off or is damaged; nothing of it was kept, so run the same again\n{said}"
    # with no retries left pip says no more than that it knows no version at all
    if any(word in output for word in NETWORK) or "(from versions: none)" in output:
        return (
            f"{what} could not be downloaded: the package index was not reached, or has nothing of that name; "
            "check the "
            f"network, or pip's index-url and proxy settings (`pip config list`), and run the same again\n{said}"
        )
    if "No matching distribution" in output:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"the package index that pip uses has no {what} for Python {version} on Linux x86-64; it must be "
            "one that carries the "
            f"CUDA build, as PyPI does (`pip config list` shows which it is), or name a version that it has "
            f"with --torch\n{said}"
        )
    return f"pip could not install {what}; put right what it says, and run the same again\n{said}"
