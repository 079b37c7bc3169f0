"""``devguard sim``: run a program on simulated GPUs, or show what the processes on them hold."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys

from devguard.cli import program
from devguard.errors import SimulationError

__all__ = ["HELP", "configure", "run"]

HELP = "run any program on simulated GPUs, on a machine that has none"
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    forms = ("devguard sim [options] -- COMMAND [ARGUMENT ...]", "devguard sim --state FILE [--json]", "devguard sim")
    parser.usage = "\n       ".join(forms)
    parser.epilog = "Without a command: with --state, show what each process holds; else make everything ready."
    parser.add_argument("--gpus", type=int, metavar="N", help="how many simulated GPUs, 1 to 16 (default 2)")
    parser.add_argument("--torch", metavar="VERSION", help="the version of torch (default: this environment's)")
    parser.add_argument("--memory", metavar="SIZE", help="memory of each GPU, such as 8G or 512M (default 8G)")
    parser.add_argument("--state", metavar="FILE", help="the state file: who holds what on which GPU")
    parser.add_argument("--log", metavar="FILE", help="write one line for each interesting CUDA call")
    parser.add_argument("--json", action="store_true", help="show the state, or where the overlay is, as JSON")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, after --")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; with a program, this process becomes that program."""
    from devguard.simgpu import launch

    arguments.gpus = 2 if arguments.gpus is None else arguments.gpus
    arguments.memory = None if arguments.memory is None else _bytes(arguments.memory)
    launch.checked(arguments.gpus, arguments.memory)
    if arguments.program:
        return _execute(arguments)
    if arguments.state:
        return _show(arguments.state, as_json=arguments.json)
    return _ready(arguments)


def _execute(arguments: argparse.Namespace) -> int:
    from devguard import simgpu

    command: list[str] = arguments.program
    path = program.find("sim", command[0])
    if path is None:
        return program.NOT_FOUND
    _warn_other_python(command[0], path)
    environment = simgpu.environment(
        arguments.gpus,
        torch=arguments.torch,
        memory=arguments.memory,
        state=arguments.state,
        log=arguments.log,
    )
    return program.become("sim", path, command, environment)


def _warn_other_python(name: str, path: str) -> None:
    """The overlay holds torch for this very version of Python; a program that is another Python cannot import it."""
    base = os.path.basename(name)
    if not re.fullmatch(r"python[0-9.]*t?", base):
        return
    if os.path.realpath(path) != os.path.realpath(sys.executable):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(
            f"devguard sim: warning: {path} is not the Python that devguard runs on ({sys.executable}, "
            f"{version}); torch on "
            f"simulated GPUs is made for that one, so run `{sys.executable} -m devguard sim -- "
            f"{sys.executable} ...` if it fails",
            file=sys.stderr,
        )


def _ready(arguments: argparse.Namespace) -> int:
    from devguard.simgpu import overlay

    made = overlay.prepare(arguments.torch)
    if arguments.json:
        needs = str(made.needs) if made.needs else None
        print(json.dumps({"ready": True, "torch": made.torch, "overlay": str(made.folder), "needs": needs}, indent=2))
    else:
        print(f"ready: simulated GPUs for torch {made.torch} in {made.folder}")
        print("next: devguard sim --gpus 4 -- python your_script.py")
    return 0


def _show(path: str, *, as_json: bool) -> int:
    from devguard import simgpu

    processes = simgpu.state(path)
    if as_json:
        print(json.dumps({"processes": [process.as_dict() for process in processes]}, indent=2))
        return 0
    if not processes:
        print("no process has used a simulated GPU yet")
        return 0
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise SimulationError(
            "the table needs rich: install the extra with `pip install 'torch-devguard[sim]'`, or ask for --json"
        ) from error

    table = Table(title="Simulated GPUs: MiB held (peak)", title_justify="left")
    table.add_column("process", overflow="fold")
    table.add_column("pid", justify="right")
    table.add_column("alive")
    count = max(len(process.devices) for process in processes)
    for index in range(count):
        table.add_column(f"GPU {index}", justify="right")
    for process in processes:
        cells = [_cell(device) for device in process.devices]
        cells += [""] * (count - len(cells))
        table.add_row(process.name, str(process.pid), "yes" if process.alive else "no", *cells)
    Console().print(table)
    print("- no context    a dead process: what it held at its end")
    return 0


def _cell(device: object) -> str:
    from devguard.simgpu import DeviceState

    assert isinstance(device, DeviceState)
    if not device.context:
        return "-"
    return f"{device.bytes / 2**20:.0f} ({device.peak_bytes / 2**20:.0f})"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise SimulationError(f"--memory {text}: give a size such as 8G, 512M or 8589934592")
    return int(float(found[1]) * 2 ** UNITS[found[2].upper()])
