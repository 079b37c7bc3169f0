"""``devguard run``: run a program that knows nothing of devguard, guarded; or print who opens which CUDA context."""

from __future__ import annotations

import argparse
import os
import sys

from devguard.cli import program
from devguard.errors import ConfigError
from devguard.ownership.resolve import owner_from_environment

__all__ = ["HELP", "configure", "run"]

HELP = "run any program guarded, without a change to it; or print who opens which context, with --trace-contexts"
USAGE = """devguard run [--mode MODE] [--device DEVICE] [--doors DOOR=MODE,...] [--log DIR] -- COMMAND [ARGUMENT ...]
       devguard run --trace-contexts [--output FILE] [--json] [--mode MODE] [...] -- COMMAND [ARGUMENT ...]"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = USAGE
    parser.epilog = (
        "It sets DEVGUARD and its companions and becomes the program; every process of it that imports torch is "
        "guarded. With simulated GPUs: devguard sim --gpus 2 -- devguard run -- COMMAND"
    )
    guarding = parser.add_argument_group("guarding")
    guarding.add_argument("--mode", help="off, observe, warn, repair or error (default: DEVGUARD, or repair)")
    guarding.add_argument(
        "--device",
        help="the GPU that the program owns, such as cuda:1, or cpu; by default the launcher's local rank, or what the "
        "program itself chooses with torch.cuda.set_device",
    )
    guarding.add_argument("--doors", metavar="DOOR=MODE,...", help="modes of single doors, as in ipc=error,threads=off")
    guarding.add_argument("--log", metavar="DIR", help="collect the journals of all processes there, for devguard log")
    tracing = parser.add_argument_group("tracing")
    tracing.add_argument(
        "--trace-contexts",
        action="store_true",
        help="report each CUDA context that the program or a child of it opens; it is guarded too only if one of the "
        "options above is given",
    )
    tracing.add_argument("--output", metavar="FILE", help="append the reports to this file (default: standard error)")
    tracing.add_argument("--json", action="store_true", help="report one JSON object a line")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, after --")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; this process becomes the program."""
    command: list[str] = arguments.program
    if not command:
        raise ConfigError(f"name a program to run, after --\nusage: {USAGE}")
    if not arguments.trace_contexts and (arguments.output or arguments.json):
        raise ConfigError("--output and --json say where --trace-contexts reports; give that too, or leave them out")
    environment = dict(os.environ)
    asked = (arguments.mode, arguments.device, arguments.doors, arguments.log)
    if not arguments.trace_contexts or any(said is not None for said in asked):
        _guard(arguments, environment)
    path = program.find("run", command[0])
    if path is None:
        return program.NOT_FOUND
    if arguments.trace_contexts:
        from devguard import tracing

        environment = tracing.environment(arguments.output, json=arguments.json, base=environment)
    return program.become("run", path, command, environment)


def _guard(arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Say in `environment` what was asked for, if it means anything."""
    from devguard.activation.environment import read

    said = {
        "DEVGUARD": arguments.mode or environment.get("DEVGUARD", "").strip() or "repair",
        "DEVGUARD_DEVICE": arguments.device,
        "DEVGUARD_DOORS": arguments.doors,
        "DEVGUARD_LOG": arguments.log and os.path.abspath(arguments.log),
    }
    environment.update({name: value for name, value in said.items() if value is not None})
    if read(environment).owner is not None:
        owner_from_environment(environment)
    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        raise ConfigError(
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it, or guard in code: the "
            "decorator, or devguard.install()."
        )
    import importlib.metadata

    if not any(found.name == "devguard" for found in importlib.metadata.entry_points(group="torch.backends")):
        print(
            "devguard run: warning: devguard is not installed here, only importable, so torch will not load it; "
            "install it with pip, in the environment of the program",
            file=sys.stderr,
        )
