"""The ``devguard`` command: one module for each subcommand, imported only when that subcommand is called.

A command module defines ``configure(parser)`` and ``run(arguments) -> int``. Importing it must stay cheap, so ``run``
imports torch, rich and other large packages.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys

from devguard._version import __version__
from devguard.cli import program
from devguard.errors import DevGuardError
from devguard.support.terminal import complain, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

__all__ = ["main"]

# The name of each command and its line of help. The module is devguard.cli.<name>.
COMMANDS = {
    "demo": "show the bug and the fix: stray tensors on GPU 0, before and after the guard",
    "doctor": "check versions, devices, doors, settings and shared memory, and suggest what to do next",
    "log": "show the strays that DEVGUARD_LOG or devguard run --log recorded: per call site, most bytes first",
    "report": "write one page on a run: which process was on which GPU, when, by which line, and what to write there",
    "run": "run any program guarded, without changing it; or report which calls open CUDA contexts (--trace-contexts)",
    "sim": "run any program on simulated GPUs, on a machine that has none",
    "watch": "show which process is on which GPU, and which line put it there; live, once for CI, or as metrics",
}


PROGRAMS = ("run", "sim", "watch")  # the commands that end with a program and its arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print a message that quotes the command line, which may hold anything."""
        super().error(printable(message, keep="\n"))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or an error; argparse would ignore that standard output cannot be written."""
        if message and file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``devguard`` command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status: 0 if all is well, 1 if there is a problem, 2 for bad usage or bad configuration, 3 where a gate
        of ``devguard log`` fails, or ``devguard watch --once`` shows a stray.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # The reader of the output, such as `head`, has ended.
        _drop_output()
    except OSError as error:
        is_output = _drop_output()
        what = "standard output cannot be written: " if is_output else ""
        name = " ".join(["devguard", *[word for word in arguments if word in COMMANDS][:1]])
        complain(f"{name}: {what}{_explain(error)}")
    return 1


def _run(arguments: list[str]) -> int:
    """Read the arguments, and run the command that they name."""
    parser = _Parser(
        prog="devguard",
        description="Keeps each process of a multi-GPU PyTorch program on its own GPU, and names the line of code that "
        "strays.",
    )
    parser.add_argument("--version", action="version", version=f"devguard {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    usage: argparse.ArgumentParser = parser  # that of the command, once it is known
    words: list[str] | None = None  # of the program that devguard runs
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            usage = command
            module = importlib.import_module(f"devguard.cli.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
            if name in PROGRAMS:
                before = arguments.index(chosen) + 1
                rest = arguments[before:]
                own, words = program.split_at_dashes(rest) if name == "watch" else program.split(command, rest)
                arguments = [*arguments[:before], *own]
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        advice = ". A program is written after --" if chosen == "watch" else ""
        usage.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    if words is not None:
        parsed.program = words
    if parsed.command is None:
        parser.print_help()
        return 0
    try:
        status: int = parsed.run(parsed)
    except DevGuardError as error:
        complain(f"devguard {parsed.command}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    if sys.stdout is None and parsed.command not in PROGRAMS:  # those print nothing there
        raise OSError(errno.EBADF, "it is closed")
    return status


def _drop_output() -> bool:
    """Discard what standard output still holds, so that Python does not write it again at its end.

    Return whether standard output is what cannot be written.
    """
    if sys.stdout is None:
        return True
    try:
        print(flush=True)  # A flush alone writes nothing where the text that failed is gone from the buffer.
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _explain(error: OSError) -> str:
    where = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror or error}{where}"


if __name__ == "__main__":
    sys.exit(main())
