"""``devguard run``: run a program, and print who opens which CUDA context."""

from __future__ import annotations

import argparse

from devguard.cli import executing
from devguard.errors import ConfigError

__all__ = ["HELP", "configure", "run"]

HELP = "run any program and print who opens which context: device, process, thread, library, Python stack"
USAGE = "devguard run --trace-contexts [--output FILE] [--json] -- COMMAND [ARGUMENT ...]"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = USAGE
    parser.epilog = "With simulated GPUs: devguard sim --gpus 2 -- devguard run --trace-contexts -- COMMAND"
    parser.add_argument(
        "--trace-contexts", action="store_true", help="report each CUDA context that the program or a child of it opens"
    )
    parser.add_argument("--output", metavar="FILE", help="append the reports to this file (default: standard error)")
    parser.add_argument("--json", action="store_true", help="report one JSON object a line")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, after --")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; this process becomes the program."""
    program: list[str] = arguments.program
    if not arguments.trace_contexts:
        raise ConfigError(
            "running a program under a guard is not there yet. What there is: --trace-contexts, with --output FILE and "
            f"--json\nusage: {USAGE}"
        )
    if not program:
        raise ConfigError(f"name a program to run, after --\nusage: {USAGE}")
    path = executing.find("run", program[0])
    if path is None:
        return executing.NOT_FOUND
    from devguard import tracing

    environment = tracing.environment(arguments.output, json=arguments.json)
    return executing.become("run", path, program, environment)
