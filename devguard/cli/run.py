"""``devguard run``: run a program guarded, without changing it; or report which calls open CUDA contexts."""

from __future__ import annotations

import argparse
import os

from devguard.cli import program
from devguard.errors import ConfigError
from devguard.ownership.resolve import owner_from_environment
from devguard.support.terminal import complain

__all__ = ["configure", "run"]

USAGE = """devguard run [--mode MODE] [--device DEVICE] [--doors DOOR=MODE,...] [--log DIR] -- COMMAND [ARGUMENT ...]
       devguard run --trace-contexts [--output FILE] [--json] [--mode MODE] [...] -- COMMAND [ARGUMENT ...]"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard run``."""
    parser.usage = USAGE
    parser.epilog = (
        "devguard run sets DEVGUARD and related variables, then becomes the program. Every process of the program "
        "that imports torch is guarded. On simulated GPUs: devguard sim --gpus 2 -- devguard run -- COMMAND"
    )
    guarding = parser.add_argument_group("guarding")
    guarding.add_argument("--mode", help="off, observe, warn, repair or error (default: DEVGUARD, or repair)")
    guarding.add_argument(
        "--device",
        help="the device that the program owns: cpu, or a GPU such as cuda:1 (default: the GPU of the launcher's local "
        "rank, or the one that the program selects with torch.cuda.set_device)",
    )
    guarding.add_argument(
        "--doors", metavar="DOOR=MODE,...", help="modes of single doors, for example ipc=error,threads=off"
    )
    guarding.add_argument(
        "--log", metavar="DIR", help="record the strays of all processes in this folder, for devguard log"
    )
    tracing = parser.add_argument_group("tracing")
    tracing.add_argument(
        "--trace-contexts",
        action="store_true",
        help="report each CUDA context that the program or one of its children opens. The program is then guarded only "
        "if one of the options above is given too",
    )
    tracing.add_argument("--output", metavar="FILE", help="append the reports to this file (default: standard error)")
    tracing.add_argument("--json", action="store_true", help="report one JSON object a line")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, after --")


def run(arguments: argparse.Namespace) -> int:
    """Set the environment, and replace this process with the program."""
    command: list[str] = arguments.program
    if not command:
        raise ConfigError(f"no program given; name a program to run after --\nusage: {USAGE}")
    if not arguments.trace_contexts and (arguments.output or arguments.json):
        raise ConfigError("--output and --json are only valid with --trace-contexts. Add it, or leave them out.")
    environment = dict(os.environ)
    guarding = (arguments.mode, arguments.device, arguments.doors, arguments.log)
    if not arguments.trace_contexts or any(option is not None for option in guarding):
        _set_guard(arguments, environment)
    path = program.find("run", command[0])
    if path is None:
        return program.NOT_FOUND
    if arguments.trace_contexts:
        from devguard import tracing

        environment = tracing.environment(arguments.output, json=arguments.json, base=environment)
    return program.become("run", path, command, environment)


def _set_guard(arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Set devguard's variables in `environment` from the options, and check them."""
    from devguard.activation.environment import read

    settings = {
        "DEVGUARD": arguments.mode or environment.get("DEVGUARD", "").strip() or "repair",
        "DEVGUARD_DEVICE": arguments.device,
        "DEVGUARD_DOORS": arguments.doors,
        "DEVGUARD_LOG": arguments.log and os.path.abspath(arguments.log),
    }
    environment.update({name: value for name, value in settings.items() if value is not None})
    if read(environment).owner is not None:
        owner_from_environment(environment)
    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        raise ConfigError(
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it, or guard in code, with the "
            "decorator or devguard.install()."
        )
    import importlib.metadata

    if not any(found.name == "devguard" for found in importlib.metadata.entry_points(group="torch.backends")):
        complain(
            "devguard run: warning: devguard is importable here but not installed, so torch will not load it. "
            "Install it with pip in the environment of the program."
        )
