"""``devguard doctor``: versions, devices, doors and settings, whether the guard is effective here, and what to do next.

What needs torch runs in a child (selfcheck.py), so that the doctor itself opens no context and outlives a broken torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from devguard._version import __version__

__all__ = ["configure", "HELP", "run"]

HELP = "check versions, devices, doors and settings, and say what to do next"

LIMIT = 300.0  # seconds for the self-check; importing torch on a cold, busy machine takes most of them
TAIL = 6  # lines of a failed self-check to show


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Examine this environment and print what was found.

    Returns
    -------
    int
        0 fine, 1 something is wrong, 2 a setting means nothing.
    """
    found = examine(os.environ)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return int(found["status"])


def examine(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return everything the doctor knows, as plain data.

    Returns
    -------
    dict
        ``status`` (the exit status), ``versions``, ``devices``, ``doors``, ``check``, ``environment``,
        ``simulated_gpus``, ``sglang`` (None where it is not installed), ``configuration`` (settings that mean
        nothing), ``problems``, ``notes`` and ``advice`` (lists of text).
    """
    from devguard.cli import variables

    configuration = variables.check_settings(environ)
    problems: list[str] = []
    notes: list[str] = []
    torch = _version("torch")
    inner: dict[str, Any] = {}
    if torch is None:
        problems.append(
            "torch is not installed here, and devguard guards torch. Install the build that fits your machine "
            "(pytorch.org), or any build with: pip install 'torch-devguard[torch]'."
        )
    else:
        inner = _self_check(environ)
        _judge(inner, environ, configuration, problems, notes)
    simulated = _simulation(environ)
    wrapt = _version("wrapt")
    if wrapt is None:
        problems.append("wrapt is not installed, and the doors need it. Install it with: pip install 'wrapt>=2'.")
    found = {
        "status": 2 if configuration else 1 if problems else 0,
        "versions": {
            "devguard": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": inner.get("torch", torch),
            "torch_file": inner.get("torch_file"),
            "cuda": inner.get("cuda"),
            "driver": inner.get("driver"),
            "wrapt": wrapt,
        },
        "devices": {
            "visible": inner.get("visible"),
            "names": inner.get("names", []),
            "simulated": f"{variables.SIMULATION}GPUS" in environ,
            "owner": inner.get("owner"),
        },
        "doors": inner.get("doors", {}),
        "check": inner.get("check"),
        "environment": variables.that_matter(environ),
        "simulated_gpus": simulated,
        "sglang": _sglang(notes),
        "configuration": configuration,
        "problems": problems,
        "notes": notes,
    }
    return {**found, "advice": _advice(found)}


def _self_check(environ: Mapping[str, str]) -> dict[str, Any]:
    """Run selfcheck.py in a child and return what it found, or ``{"failed": reason}``."""
    from devguard.demo.launch import importable

    command = [sys.executable, "-m", "devguard.cli.selfcheck"]
    try:
        done = subprocess.run(
            command, env=importable(environ), capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {LIMIT:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    except ValueError:
        found = {}
    if found:
        return found
    words = "\n    ".join(done.stderr.strip().splitlines()[-TAIL:]) or "it said nothing"
    return {"failed": f"it ended with status {done.returncode}:\n    {words}"}


def _judge(
    inner: dict[str, Any], environ: Mapping[str, str], configuration: list[str], problems: list[str], notes: list[str]
) -> None:
    """Turn what the self-check found into sentences."""
    if "failed" in inner:
        problems.append(f"the self-check could not run: {inner['failed']}")
        return
    killed = environ.get("DEVGUARD", "").strip().lower() in ("off", "0")
    check = inner["check"]
    if killed:
        problems.append(
            "DEVGUARD=off keeps every door closed here, whatever the code asks for. Unset it to be guarded."
        )
    elif not check["effective"]:
        problems.append(
            f"the guard is not effective here: a tensor tagged {check['tag']} was unpickled under "
            f"guard({check['owner']!r}) and landed on {check['landed']} (recorded: {check['recorded']}, "
            f"contexts: {check['contexts'] or 'none'}). "
            f"{check['error'] or ''}".rstrip()
        )
    problems += [f"door {name}: {row['problem']}" for name, row in inner["doors"].items() if "problem" in row]
    early = [copy for row in inner["doors"].values() for copy in row.get("early_copies", ())]
    if early:
        notes.append(f"copies of torch's functions taken before the doors opened pass them by: {', '.join(early)}.")
    owner_error = inner["owner"]["error"]
    if owner_error and owner_error not in configuration:
        configuration.append(owner_error)
    wanted = environ.get("DEVGUARD", "").strip()
    if wanted and not killed and not configuration and not inner["open_at_import"]:
        problems.append(
            f"DEVGUARD={wanted} is set, but importing torch opened no door. Guard in code instead: the decorator, or "
            "devguard.install()."
        )
    if inner["contexts"]:
        notes.append(f"importing torch alone opened contexts on {', '.join(inner['contexts'])}.")
    if inner["cuda"] and not inner["visible"]:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        why = "is a driver installed?" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}."
        notes.append(f"torch is built for GPUs and sees none: {why}")


def _simulation(environ: Mapping[str, str]) -> dict[str, Any]:
    """Tell whether simulated GPUs can be had here; nothing is built or downloaded to find out."""
    missing = []
    if sys.platform != "linux" or platform.machine() != "x86_64":
        missing.append(f"Linux on x86-64 (this is {sys.platform} on {platform.machine()})")
    compilers = [environ["CC"]] if environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        missing.append(f"a C compiler ({', '.join(compilers)}: not found)")
    missing += [f"the program {tool} (binutils)" for tool in ("nm", "readelf") if shutil.which(tool) is None]
    packages = [name for name in ("filelock", "platformdirs", "rich") if _version(name) is None]
    if packages:
        missing.append(f"{', '.join(packages)} (pip install 'torch-devguard[sim]')")
    return {"possible": not missing, "compiler": compiler, "missing": missing}


def _advice(found: dict[str, Any]) -> list[str]:
    """Return what to do next, most urgent first."""
    if found["configuration"]:
        return ["Correct or unset the settings above; until then nobody can rely on the guard."]
    if found["versions"]["torch"] is None:
        advice = ["Install torch, then run `devguard doctor` again."]
        if found["simulated_gpus"]["possible"]:
            advice.append("Or see it work without: devguard demo (it fetches a torch of its own into your cache).")
        return advice
    if found["problems"]:
        return ["Solve the problems above, then run `devguard doctor` again."]
    advice = [
        'Decorate each worker\'s entry point: @devguard.guard(argument="gpu_id"), with the name of its device argument.'
    ]
    visible = found["devices"]["visible"] or 0
    if visible >= 2:
        advice.append("See it work on these GPUs: devguard demo")
    elif found["simulated_gpus"]["possible"]:
        advice.append("See it work on simulated GPUs: devguard demo")
        advice.append("Run your own program on simulated GPUs: devguard sim --gpus 2 -- python your_program.py")
    else:
        advice.append(f"For simulated GPUs this machine lacks: {'; '.join(found['simulated_gpus']['missing'])}.")
    return advice


def _sglang(notes: list[str]) -> dict[str, Any] | None:
    """Return the installed SGLang and those of its known bugs that it has."""
    version = _version("sglang")
    if version is None:
        return None
    from devguard.integrations import sglang
    from devguard.integrations.sglang import versions

    try:
        versions.check(version)
    except sglang.UnsupportedVersionError as error:
        notes.append(str(error))
        return {"version": version, "known": False, "bugs": []}
    return {"version": version, "known": True, "bugs": [dataclasses.asdict(bug) for bug in sglang.known_bugs(version)]}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(found: dict[str, Any]) -> None:
    """Print the findings as text."""
    versions, devices, check = found["versions"], found["devices"], found["check"]
    cuda = f"built for CUDA {versions['cuda']}" if versions["cuda"] else "built without CUDA"
    print(f"devguard {versions['devguard']}, Python {versions['python']}, wrapt {versions['wrapt'] or 'not installed'}")
    print(f"torch {versions['torch']}, {cuda}" if versions["torch"] else "torch: not installed")
    print(f"driver: {versions['driver'] or 'none found'}")
    names = f" ({', '.join(devices['names'])})" if devices["names"] else ""
    kind = "simulated devices" if devices["simulated"] else "devices"
    print(f"{kind} visible: {'unknown' if devices['visible'] is None else devices['visible']}{names}")
    if devices["owner"] and devices["owner"]["device"]:
        print(f"owner that the environment names: {devices['owner']['device']}")
    if check is not None:
        verdict = "effective" if check["effective"] else "NOT effective"
        print(
            f"guard: {verdict} (a tensor tagged {check['tag']}, unpickled under guard({check['owner']!r}), landed on "
            f"{check['landed']}; contexts: {', '.join(check['contexts']) or 'none'})"
        )
    for name, row in found["doors"].items():
        print(f"  door {name}: {'open' if row['open'] else 'closed'}, {row['mode']}")
    possible = "possible here" if found["simulated_gpus"]["possible"] else "not possible here"
    print(f"simulated GPUs: {possible}")
    if found["sglang"] is not None:
        print(f"SGLang {found['sglang']['version']}")
    for bug in found["sglang"]["bugs"] if found["sglang"] else ():
        print(f"  wrong GPU: {bug['what']} ({bug['reference']})\n    devguard, {bug['remedy']}")
    for name, value in found["environment"].items():
        print(f"  {name}={value}")
    for title in ("configuration", "problems", "notes"):
        for line in found[title]:
            print(f"{title.removesuffix('s')}: {line}")
    print("next:")
    for line in found["advice"]:
        print(f"  {line}")
