"""``devguard sim``: run a program on simulated GPUs, or show what each process holds on them."""

from __future__ import annotations

import argparse
import os
import re
import sys

from devguard.cli import program
from devguard.errors import SimulationError
from devguard.support.sizes import parse_size
from devguard.support.terminal import complain, printable, show, show_json

__all__ = ["configure", "run"]

MOST_SHOWN = 40  # characters of a size that is not valid


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard sim``."""
    forms = ("devguard sim [options] -- COMMAND [ARGUMENT ...]", "devguard sim --state FILE [--json]", "devguard sim")
    parser.usage = "\n       ".join(forms)
    parser.epilog = (
        "The -- may be left out. "
        "Without a command, --state shows what each process holds on each GPU. Without --state too, devguard sim only "
        "prepares the simulation."
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="how many simulated GPUs, 1 to 16 (default 2)")
    parser.add_argument("--torch", metavar="VERSION", help="the version of torch (default: this environment's)")
    parser.add_argument("--memory", metavar="SIZE", help="memory of each GPU, for example 512M (default 8G)")
    parser.add_argument("--state", metavar="FILE", help="the file that records what each process holds on each GPU")
    parser.add_argument("--log", metavar="FILE", help="write one line for each interesting CUDA call")
    parser.add_argument("--json", action="store_true", help="print JSON: the state, or the path of the overlay")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, with its arguments")


def run(arguments: argparse.Namespace) -> int:
    """Run the program (this process becomes it), show a state file, or prepare the simulation."""
    from devguard.simgpu import launch

    program.refuse_empty({f"--{name}": getattr(arguments, name) for name in ("torch", "memory", "state", "log")})
    arguments.gpus = 2 if arguments.gpus is None else arguments.gpus
    try:
        launch.checked(arguments.gpus, None)
    except SimulationError as error:
        raise SimulationError(f"--gpus {arguments.gpus}: {error}") from None
    if arguments.memory is not None:
        arguments.memory = _check_memory(arguments.memory)
    if arguments.program:
        return _execute(arguments)
    if arguments.state:
        return _show_state(arguments.state, as_json=arguments.json)
    return _prepare(arguments)


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
    """Warn if the program is another Python: the overlay holds torch for the version of this Python only."""
    base = os.path.basename(name)
    if not re.fullmatch(r"python[0-9.]*t?", base):
        return
    if os.path.realpath(path) != os.path.realpath(sys.executable):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        complain(
            f"devguard sim: warning: {path} is not the Python that runs devguard ({sys.executable}, {version}), and "
            f"the simulated torch is built for Python {version}. If the program fails, run "
            f"`{sys.executable} -m devguard sim -- {sys.executable} ...`"
        )


def _prepare(arguments: argparse.Namespace) -> int:
    from devguard.simgpu import overlay

    made = overlay.prepare(arguments.torch)
    if arguments.json:
        needs = str(made.needs) if made.needs else None
        show_json({"ready": True, "torch": made.torch, "overlay": str(made.folder), "needs": needs})
    else:
        show(f"ready: simulated GPUs for torch {made.torch} in {made.folder}")
        show("next: devguard sim --gpus 4 -- python your_script.py")
    return 0


def _show_state(path: str, *, as_json: bool) -> int:
    from devguard import simgpu

    processes = simgpu.state(path)
    if as_json:
        show_json({"processes": [process.as_dict() for process in processes]})
        return 0
    if not processes:
        show("no process has used a simulated GPU yet")
        return 0
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise SimulationError(
            "the table needs rich, which is not installed. Install it with: pip install 'torch-devguard[sim]', or use "
            "--json."
        ) from error

    table = Table(title="Simulated GPUs: MiB held (peak)", title_justify="left")
    table.add_column("process", overflow="fold")
    table.add_column("pid", justify="right")
    table.add_column("alive")
    count = max(len(process.devices) for process in processes)
    for index in range(count):
        table.add_column(f"GPU {index}", justify="right")
    for process in processes:
        cells = [_format_cell(device) for device in process.devices]
        cells += [""] * (count - len(cells))
        table.add_row(Text(printable(process.name)), str(process.pid), "yes" if process.alive else "no", *cells)
    Console().print(table)
    show("-: no context    a dead process is shown with what it held when it ended")
    return 0


def _format_cell(device: object) -> str:
    from devguard.simgpu import DeviceState

    assert isinstance(device, DeviceState)
    if not device.context:
        return "-"
    return f"{device.bytes / 2**20:.0f} ({device.peak_bytes / 2**20:.0f})"


def _check_memory(text: str) -> int:
    """Return the bytes that ``--memory`` names."""
    from devguard.simgpu import launch

    size = parse_size(text)
    if size is None:
        shown = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
        raise SimulationError(f"--memory {shown}: this is not a size. Valid: a size such as 8G, 512M or 8589934592.")
    try:
        return launch.checked(1, size)
    except SimulationError as error:
        raise SimulationError(f"--memory {text}: {error}") from None
