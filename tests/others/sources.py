"""Download the suites and their requirements with this environment's pip into the user's cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from devguard.simgpu import cached, overlay, wheels
from devguard.simgpu.progress import Reporter

__all__ = ["installed", "sdist", "unpack"]

# Before pip downloads a source distribution it asks the build backend for metadata, and maturin would start cargo,
# which would download many crates. This backend copies the metadata, because only the tests are needed.
BACKEND = """
import email, os, shutil

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    with open("PKG-INFO", encoding="utf-8") as file:
        about = email.message_from_file(file)
    name = f"{about['Name'].replace('-', '_')}-{about['Version']}.dist-info"
    os.mkdir(os.path.join(folder, name))
    shutil.copy("PKG-INFO", os.path.join(folder, name, "METADATA"))
    return name
"""
BACKENDS = {"safetensors": "maturin"}


def sdist(name: str, version: str) -> Path:
    """Return the source distribution of a release, which is downloaded once."""

    def fill(stage: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            options, environment = [], {}
            if name in BACKENDS:
                Path(scratch, f"{BACKENDS[name]}.py").write_text(BACKEND)
                options, environment = ["--no-build-isolation"], {"PYTHONPATH": scratch}
            command = ["download", "--no-deps", "--no-binary", name, "--dest", str(stage), *options]
            _pip([*command, f"{name}=={version}"], environment)

    return next(_folder(f"{name}-{version}", fill).glob("*.tar.gz"))


def installed(requirements: tuple[str, ...]) -> Path:
    """Return a folder with these requirements installed, without their dependencies."""
    report = Reporter(True)
    text = ", ".join(requirements)

    def fill(stage: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch, report.steps():
            wheels.install(
                requirements,
                stage / "site",
                dependencies=False,
                scratch=Path(scratch),
                text=text,
                expected=1_000_000,
                report=report,
            )

    tag = "-".join((sys.implementation.cache_tag or "python", *(word.replace("==", "-") for word in requirements)))
    return _folder(tag, fill) / "site"


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a source distribution; return its folder."""
    with tarfile.open(archive) as file:
        if hasattr(tarfile, "data_filter"):
            file.extractall(target, filter="data")
        else:
            file.extractall(target)
    return next(path for path in target.iterdir() if path.is_dir())


def _folder(name: str, fill: Callable[[Path], None]) -> Path:
    return cached.get(overlay.cache_folder().parent / "others", name, fill, Reporter(True))


def _pip(arguments: list[str], environment: dict[str, str]) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_TARGET")}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
