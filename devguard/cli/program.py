"""The program of a command such as ``devguard run``: separate it from the options, find it, and become it.

The program begins at the first word that is no option of devguard, or after ``--``; all that follows belongs to it. In
``devguard watch``, which has a word of its own, it begins after ``--`` only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from collections.abc import Mapping, Sequence

from devguard.errors import ConfigError
from devguard.support.notices import flush
from devguard.support.terminal import complain

__all__ = [
    "become",
    "find",
    "IGNORED_BY_PYTHON",
    "name_options",
    "NOT_FOUND",
    "refuse_empty",
    "report_failure",
    "split",
    "split_at_dashes",
]

NOT_FOUND, NOT_RUNNABLE = 127, 126  # the exit statuses of a shell
# A program inherits that; then it would not end when the reader of its output does.
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def split(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return devguard's own options, and the words of the program."""
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    place = 0
    while place < len(words):
        word = words[place]
        if word == "--":
            return list(words[:place]), list(words[place + 1 :])
        if word == "-" or not word.startswith("-"):
            break
        name, equals, _ = word.partition("=")
        # argparse accepts the beginning of a long option as well.
        known = [name] if name in takes_value else [each for each in takes_value if each.startswith(name)]
        place += 2 if not equals and any(takes_value[each] for each in known) else 1
    return list(words[:place]), list(words[place:])


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before ``--``, and the program after it; for a command with words of its own."""
    place = list(words).index("--") if "--" in words else len(words)
    return list(words[:place]), list(words[place + 1 :])


def name_options(message: str, given: Mapping[str, tuple[str, str | None]]) -> str:
    """Return a message about variables in terms of the options that set them.

    Parameters
    ----------
    message : str
        A message that names the variables.
    given : mapping of str to tuple
        For each variable the option, and its value; None if the option was not given.
    """
    for variable, (option, value) in given.items():
        if value is None:
            continue
        written = f"{option} {value}"
        for known, shown in (
            (f"{variable}={value!r}", f"{written}: {value!r}"),
            (f"{variable} is {value!r}", f"{written}: the device is {value!r}"),
            (f"{variable}={value}", written),
            (f"Unset {variable}:", f"Leave out {option}:"),
            (f"{variable}:", f"{written}:"),
        ):
            message = message.replace(known, shown)
    return message


def refuse_empty(given: Mapping[str, str | None]) -> None:
    """Raise `ConfigError` for an option with an empty value, often of a variable that is not set."""
    for option, value in given.items():
        if value is not None and not value.strip():
            raise ConfigError(f"{option} has an empty value. Give it a value, or leave out {option}.")


def find(command: str, program: str) -> str | None:
    """Return the path of `program`, or None after a message from ``devguard <command>`` if it is not on PATH."""
    path = shutil.which(program)
    if path is None:
        complain(f"devguard {command}: there is no program {program!r} on PATH{_advise(program)}")
    return path


def _advise(program: str) -> str:
    if program == "torchrun":  # it comes with torch, which on simulated GPUs may be in no environment
        return ". Write python -m torch.distributed.run in its place, or install torch."
    return ""


def become(command: str, path: str, program: list[str], environment: Mapping[str, str]) -> int:
    """Replace this process with `program`. If that fails, print a message and return the exit status."""
    flush()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in IGNORED_BY_PYTHON}
    try:
        os.execve(path, program, environment)
    except OSError as error:
        return report_failure(command, path, error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_failure(command: str, path: str, error: OSError) -> int:
    """Print that the program cannot be run, and return the exit status."""
    complain(f"devguard {command}: {path} cannot be run: {error.strerror}")
    return NOT_RUNNABLE
