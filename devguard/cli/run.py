"""``devguard run``: run a program guarded, without changing it; or report which calls open CUDA contexts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from devguard import modes
from devguard.cli import program
from devguard.errors import ConfigError, DevGuardError
from devguard.ownership import unloaded
from devguard.ownership.resolve import owner_from_environment

__all__ = ["configure", "run"]

USAGE = """devguard run [--mode MODE] [--device DEVICE] [--doors DOOR=MODE,...] [--log DIR [--record]] [--summary]
                    COMMAND [ARGUMENT ...]
       devguard run --trace-contexts [--output FILE] [--json] [--mode MODE] [...] COMMAND [ARGUMENT ...]"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard run``."""
    parser.usage = USAGE
    parser.epilog = (
        "devguard run sets DEVGUARD and related variables, then becomes the program; with --summary it waits for the "
        "program, as its parent. Every process of the program that imports torch is guarded. On simulated GPUs: "
        "devguard sim --gpus 2 devguard run COMMAND"
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
    guarding.add_argument(
        "--summary",
        action="store_true",
        help="at the end of the program, print what strayed on standard error, as devguard log does. The exit status "
        "is that of the program",
    )
    guarding.add_argument(
        "--record",
        action="store_true",
        help="with --log: each process also records its GPU memory once a second, for devguard report",
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
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="the program to run, with its arguments")


def run(arguments: argparse.Namespace) -> int:
    """Set the environment, and become the program; or run it as a child, for a summary."""
    program.refuse_empty({**dict(_given(arguments).values()), "--output": arguments.output})
    command: list[str] = arguments.program
    if not command:
        raise ConfigError(f"no program given; name a program to run, after the options\nusage: {USAGE}")
    if not arguments.trace_contexts and (arguments.output or arguments.json):
        raise ConfigError("--output and --json are only valid with --trace-contexts. Add it, or leave them out.")
    environment = dict(os.environ)
    guarding = (arguments.mode, arguments.device, arguments.doors, arguments.log)
    wishes = (arguments.summary, arguments.record, *(option is not None for option in guarding))
    guards = not arguments.trace_contexts or any(wishes)
    if guards:
        try:
            _set_guard(arguments, environment)
        except DevGuardError as error:
            raise ConfigError(program.name_options(str(error), _given(arguments))) from None
    path = program.find("run", command[0])
    if path is None:
        return program.NOT_FOUND
    if guards and not modes.is_killed(environment):
        _check_program(path, command, environment)
    if arguments.trace_contexts:
        from devguard import tracing

        environment = tracing.environment(arguments.output, json=arguments.json, base=environment)
    if arguments.summary:
        from devguard.cli import run_summary

        return run_summary.run(path, command, environment)
    return program.become("run", path, command, environment)


def _given(arguments: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    """Return the options that stand for variables, with their values."""
    return {
        "DEVGUARD_DEVICE": ("--device", arguments.device),
        "DEVGUARD_DOORS": ("--doors", arguments.doors),
        "DEVGUARD_LOG": ("--log", arguments.log),
        "DEVGUARD": ("--mode", arguments.mode),
    }


def _set_guard(arguments: argparse.Namespace, environment: dict[str, str]) -> None:
    """Set devguard's variables in `environment` from the options, and check them."""
    from devguard.activation.environment import read

    settings = {
        "DEVGUARD": arguments.mode or environment.get("DEVGUARD", "").strip() or "repair",
        "DEVGUARD_DEVICE": arguments.device,
        "DEVGUARD_DOORS": arguments.doors,
        "DEVGUARD_LOG": arguments.log,
    }
    environment.update({name: value for name, value in settings.items() if value is not None})
    if read(environment).owner is not None:
        owner_from_environment(environment)
    folder = environment.get("DEVGUARD_LOG", "").strip()
    if folder:  # the program may change its working directory
        environment["DEVGUARD_LOG"] = os.path.abspath(folder)
    if arguments.record:
        _record_in(environment.get("DEVGUARD_LOG", ""))


def _record_in(folder: str) -> None:
    """Let the processes of a log folder record their memory, whether or not they are watched."""
    from devguard.reporting.sampler import RECORDED
    from devguard.support import private_folders

    if not folder:
        raise ConfigError("--record needs a log folder. Add --log DIR, or leave out --record.")
    try:
        private_folders.make(Path(folder))
        (Path(folder) / RECORDED).touch()
    except OSError as error:
        raise ConfigError(f"--record: {folder} cannot be written: {error.strerror}. Choose another --log.") from None


def _check_program(path: str, command: list[str], environment: dict[str, str]) -> None:
    """Refuse a program that would run without the guard, with the reason."""
    if unloaded.is_prevented(environment):
        raise ConfigError(
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading devguard. Unset it, or guard in code, with the "
            "decorator or devguard.install()."
        )
    from devguard.cli import interpreter  # imports subprocess, which --help need not

    python = interpreter.find(path, command)
    problem = python and interpreter.find_problem(python, environment)
    if problem:
        raise ConfigError(f"{command[0]} would run unguarded, so it was not started: {problem}")
