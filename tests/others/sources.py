"""Fetches what the suites need through this environment's own pip, into the user's cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from devguard.simgpu import overlay

# pip asks the build backend of a source distribution for its metadata before it hands it over, and maturin would ask
# cargo, which would fetch half of Rust. We want the tests in there and build nothing.
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


def folder() -> Path:
    """Where it is all kept: ``$DEVGUARD_CACHE_DIR/others``, or below the user's cache folder."""
    return overlay.cache_folder().parent / "others"


def sdist(name: str, version: str) -> Path:
    """The source distribution of a release, downloaded once."""
    place = folder() / f"{name}-{version}"
    if not place.exists():
        with _scratch() as scratch:
            options, environment = [], {}
            if name in BACKENDS:
                (Path(scratch) / f"{BACKENDS[name]}.py").write_text(BACKEND)
                options, environment = ["--no-build-isolation"], {"PYTHONPATH": scratch}
            target = Path(scratch) / "got"
            command = ["download", "--no-deps", "--no-binary", name, "--dest", str(target), *options]
            _pip([*command, f"{name}=={version}"], environment)
            _keep(target, place)
    return next(place.glob("*.tar.gz"))


def wheels(requirements: tuple[str, ...]) -> Path:
    """A folder with these requirements installed into it, without what they require."""
    tag = f"{sys.implementation.cache_tag}-" + "-".join(word.replace("==", "-") for word in requirements)
    place = folder() / tag
    if not place.exists():
        with _scratch() as scratch:
            target = Path(scratch) / "got"
            _pip(["install", "--no-deps", "--only-binary=:all:", "--target", str(target), *requirements], {})
            _keep(target, place)
    return place


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a source distribution; the folder that it consists of."""
    with tarfile.open(archive) as file:
        if hasattr(tarfile, "data_filter"):
            file.extractall(target, filter="data")
        else:
            file.extractall(target)
    return next(path for path in target.iterdir() if path.is_dir())


def _scratch() -> tempfile.TemporaryDirectory[str]:
    folder().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder())


def _keep(made: Path, place: Path) -> None:
    try:
        made.rename(place)
    except OSError:  # another process was quicker
        shutil.rmtree(made)
        if not place.exists():
            raise


def _pip(arguments: list[str], environment: dict[str, str]) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_TARGET")}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
