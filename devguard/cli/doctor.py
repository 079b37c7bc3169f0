"""``devguard doctor``: check versions, devices, doors, settings and the guard itself, and suggest what to do next.

Checks that need torch run in a child process (selfcheck.py), so that the doctor opens no context and a broken torch
cannot crash it.
"""

from __future__ import annotations

import argparse
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
from devguard.cli import sglang_release, shared_memory, variables
from devguard.support import terminal

__all__ = ["configure", "run"]

LIMIT = 300.0  # seconds for the self-check, most of them for importing torch on a cold, busy machine
TAIL = 6  # lines of a failed self-check to show


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON on standard output")
    shared_memory.configure(parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine this environment and print the findings.

    Returns
    -------
    int
        0 if all is well, 1 if there is a problem, 2 if a setting is not valid; see `shared_memory.run` for its options.
    """
    status = shared_memory.run(arguments)
    if status is not None:
        return status
    found = examine(os.environ)
    if arguments.json:
        terminal.show_json(found)
    else:
        show(found)
    return int(found["status"])


def examine(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return all findings about this environment as plain data.

    Returns
    -------
    dict
        ``status`` (the exit status), ``versions``, ``devices``, ``doors``, ``check``, ``environment``,
        ``simulated_gpus``, ``sglang`` (None where it is not installed), ``transport`` (how its multimodal tensors
        travel; None: as it sends them), ``shared_memory`` (None without /dev/shm), ``configuration`` (what is wrong
        with the settings), ``problems``, ``notes`` and ``advice`` (lists of text).
    """
    installed = {name: _find_version(name) for name in ("torch", "wrapt", "sglang")}
    checked = {} if installed["torch"] is None else _self_check(environ)
    configuration = _list_bad_settings(checked, environ)
    problems = _list_problems(checked, installed, environ, configuration)
    sglang, sglang_notes = sglang_release.examine(installed["sglang"])
    transport, transport_problem = sglang_release.examine_transport(installed["sglang"], environ)
    problems += [transport_problem] if transport_problem else []
    found = {
        "status": 2 if configuration else 1 if problems else 0,
        "versions": _list_versions(checked, installed),
        "devices": {
            "visible": checked.get("visible"),
            "names": checked.get("names", []),
            "simulated": f"{variables.SIMULATION}GPUS" in environ,
            "owner": checked.get("owner"),
        },
        "doors": checked.get("doors", {}),
        "check": checked.get("check"),
        "environment": variables.select_relevant(environ),
        "simulated_gpus": _examine_simulation(environ),
        "sglang": sglang,
        "transport": transport,
        "shared_memory": shared_memory.examine(),
        "configuration": configuration,
        "problems": problems,
        "notes": _list_notes(checked, environ) + sglang_notes,
    }
    return {**found, "advice": _advise(found)}


def _self_check(environ: Mapping[str, str]) -> dict[str, Any]:
    """Run selfcheck.py in a child process and return its findings, or ``{"failed": reason}``."""
    from devguard.demo.launch import SAFE_PATH, make_importable

    command = [sys.executable, "-m", "devguard.cli.selfcheck"]
    child_environ = make_importable(environ) | SAFE_PATH
    try:
        done = subprocess.run(command, env=child_environ, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {LIMIT:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    except ValueError:
        found = {}
    if found:
        return found
    output = "\n    ".join(done.stderr.strip().splitlines()[-TAIL:]) or "(no output)"
    return {"failed": f"it ended with status {done.returncode}:\n    {output}"}


def _list_versions(checked: dict[str, Any], installed: Mapping[str, str | None]) -> dict[str, str | None]:
    return {
        "devguard": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": checked.get("torch", installed["torch"]),
        "torch_file": checked.get("torch_file"),
        "cuda": checked.get("cuda"),
        "driver": checked.get("driver"),
        "wrapt": installed["wrapt"],
    }


def _list_bad_settings(checked: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the settings, and why the environment names no valid owner."""
    wrong = variables.check_settings(environ)
    owner_error = checked.get("owner", {}).get("error")
    if owner_error and owner_error not in wrong:
        wrong.append(owner_error)
    return wrong


def _list_problems(
    checked: dict[str, Any],
    installed: Mapping[str, str | None],
    environ: Mapping[str, str],
    configuration: list[str],
) -> list[str]:
    """Return what keeps the guard from working here, one sentence each."""
    problems = []
    if installed["torch"] is None:
        problems.append(
            "torch is not installed here, so there is nothing to guard. Install the build that fits your machine "
            "(pytorch.org), or any build with: pip install 'torch-devguard[torch]'."
        )
    elif "failed" in checked:
        problems.append(f"the self-check could not run: {checked['failed']}")
    else:
        problems += _list_guard_problems(checked, environ, configuration)
    if installed["wrapt"] is None:
        problems.append("wrapt is not installed, and the doors need it. Install it with: pip install 'wrapt>=2'.")
    return problems


def _list_guard_problems(checked: dict[str, Any], environ: Mapping[str, str], configuration: list[str]) -> list[str]:
    """Return what the self-check found wrong with the guard and its doors."""
    problems = []
    mode = environ.get("DEVGUARD", "").strip()
    is_off = mode.lower() in ("off", "0")
    check = checked["check"]
    if is_off:
        problems.append(
            "DEVGUARD=off keeps every door closed here, even where the code uses a guard. Unset it to enable the guard."
        )
    elif not check["effective"]:
        problems.append(
            f"the guard is not effective here: a tensor tagged {check['tag']} was unpickled under "
            f"guard({check['owner']!r}) and landed on {check['landed']} (recorded: {check['recorded']}, "
            f"contexts: {check['contexts'] or 'none'}). "
            f"{check['error'] or ''}".rstrip()
        )
    problems += [f"door {name}: {row['problem']}" for name, row in checked["doors"].items() if "problem" in row]
    if mode and not is_off and not configuration and not checked["open_at_import"]:
        problems.append(
            f"DEVGUARD={mode} is set, but importing torch opened no door. Guard in code instead, with the decorator or "
            "devguard.install()."
        )
    return problems


def _list_notes(checked: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Return the findings of the self-check that deserve a note but are not problems."""
    notes = []
    early = [copy for row in checked.get("doors", {}).values() for copy in row.get("early_copies", ())]
    if early:
        notes.append(f"copies of torch functions made before the doors opened bypass the doors: {', '.join(early)}.")
    if checked.get("contexts"):
        notes.append(f"importing torch alone opened contexts on {', '.join(checked['contexts'])}.")
    if checked.get("cuda") and not checked["visible"]:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        why = "is a driver installed?" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}."
        notes.append(f"torch is built for GPUs but sees none: {why}")
    return notes


def _examine_simulation(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return whether simulated GPUs can be built here, without building or downloading anything."""
    missing = []
    if sys.platform != "linux" or platform.machine() != "x86_64":
        missing.append(f"Linux on x86-64 (this is {sys.platform} on {platform.machine()})")
    compilers = [environ["CC"]] if environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        missing.append(f"a C compiler ({', '.join(compilers)}: not found)")
    missing += [f"the program {tool} (binutils)" for tool in ("nm", "readelf") if shutil.which(tool) is None]
    packages = [name for name in ("filelock", "rich") if _find_version(name) is None]
    if packages:
        missing.append(f"{', '.join(packages)} (pip install 'torch-devguard[sim]')")
    return {"possible": not missing, "compiler": compiler, "missing": missing}


def _advise(found: dict[str, Any]) -> list[str]:
    """Return what to do next, most urgent first."""
    if found["configuration"]:
        return ["Correct or unset the settings above; until then the guard is not reliable."]
    if found["versions"]["torch"] is None:
        advice = ["Install torch, then run `devguard doctor` again."]
        if found["simulated_gpus"]["possible"]:
            advice.append("Or see it work without: devguard demo (it downloads its own torch into your cache).")
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
        advice.append(f"Simulated GPUs are not possible without: {'; '.join(found['simulated_gpus']['missing'])}.")
    return advice


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(found: dict[str, Any]) -> None:
    """Print the findings as text."""
    versions, devices, check = found["versions"], found["devices"], found["check"]
    cuda = f"built for CUDA {versions['cuda']}" if versions["cuda"] else "built without CUDA"
    terminal.show(
        f"devguard {versions['devguard']}, Python {versions['python']}, wrapt {versions['wrapt'] or 'not installed'}"
    )
    terminal.show(f"torch {versions['torch']}, {cuda}" if versions["torch"] else "torch: not installed")
    terminal.show(f"driver: {versions['driver'] or 'none found'}")
    names = f" ({', '.join(devices['names'])})" if devices["names"] else ""
    kind = "simulated devices" if devices["simulated"] else "devices"
    terminal.show(f"{kind} visible: {'unknown' if devices['visible'] is None else devices['visible']}{names}")
    if devices["owner"] and devices["owner"]["device"]:
        terminal.show(f"owner according to the environment: {devices['owner']['device']}")
    if check is not None:
        verdict = "effective" if check["effective"] else "NOT effective"
        terminal.show(
            f"guard: {verdict} (a tensor tagged {check['tag']}, unpickled under guard({check['owner']!r}), landed on "
            f"{check['landed']}; contexts: {', '.join(check['contexts']) or 'none'})"
        )
    for name, row in found["doors"].items():
        terminal.show(f"  door {name}: {'open' if row['open'] else 'closed'}, {row['mode']}")
    possible = "possible here" if found["simulated_gpus"]["possible"] else "not possible here"
    terminal.show(f"simulated GPUs: {possible}")
    sglang_release.show(found["sglang"], found["transport"])
    shared_memory.show_summary(found["shared_memory"])
    for name, value in found["environment"].items():
        terminal.show(f"  {name}={terminal.printable(value)}")
    for title in ("configuration", "problems", "notes"):
        for line in found[title]:
            terminal.show(f"{title.removesuffix('s')}: {line}")
    terminal.show("next:")
    for line in found["advice"]:
        terminal.show(f"  {line}")
