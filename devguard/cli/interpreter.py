"""The Python of a program that ``devguard run`` is about to start, and whether devguard can guard it.

The interpreter is asked for the versions that it finds, with the program's own flags (``-S``, ``-I``, ``-E``). It
imports neither torch nor the program, nor anything of the working folder. A program that is neither Python nor a
Python script is not examined.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from devguard._version import __version__
from devguard.support.installed_torch import TORCH_MINIMUM
from devguard.support.strictness import is_strict
from devguard.support.terminal import complain

__all__ = ["find", "find_problem", "Interpreter"]

LIMIT = 60.0  # seconds for the answer, on a busy machine
OLDEST_PYTHON = (3, 10)
OLDEST = {"torch": TORCH_MINIMUM, "wrapt": (2, 0)}
FLAGS = "SIEsP"  # the flags of Python that decide what it can import

# What matters about a program's Python; written for any version of Python 3. The modules of Python and the packages are
# imported without the working folder, where a file may have any name; what lies there is only looked for.
PROBE = """
import sys
path = sys.path[:]
sys.path[:] = [each for each in path if each != ""]
if not {sees_cwd}:
    path = sys.path
import json
found = {{"python": list(sys.version_info[:2])}}
try:
    from importlib import machinery, metadata, util
    found["entry"] = False
    for each in metadata.distributions(path=path):
        try:
            name = each.metadata["Name"]
            if name in ("torch", "wrapt", "torch-devguard"):
                found.setdefault(name, each.version)
            found["entry"] |= any(e.group == "torch.backends" and e.name == "devguard" for e in each.entry_points)
        except Exception:
            pass  # a damaged package, often of something else
    for name in ("torch", "wrapt", "devguard"):
        installed = util.find_spec(name) is not None
        found["can import " + name] = installed or machinery.PathFinder.find_spec(name, path) is not None
        try:
            if installed and name != "torch":
                __import__(name)
        except BaseException as error:
            found["can import " + name] = False
            found["failure of " + name] = type(error).__name__ + ": " + str(error)
except Exception as error:
    found["error"] = repr(error)
print()
print(json.dumps(found))
"""


class Interpreter(NamedTuple):
    """A Python, its flags that decide what it can import, and whether it imports from the working folder."""

    path: str
    flags: tuple[str, ...]
    sees_cwd: bool


def find(path: str, words: Sequence[str]) -> Interpreter | None:
    """Return the interpreter of a program.

    Parameters
    ----------
    path : str
        The path of the program: a Python, or a script that names one in its first line.
    words : sequence of str
        The program and its arguments.

    Returns
    -------
    Interpreter or None
        None if it is not known to be Python.
    """
    if not _is_python(path):
        return _of_script(path)
    flags: list[str] = []
    sees_cwd = True
    rest = iter(words[1:])
    for word in rest:
        if word in ("-W", "-X", "--check-hash-based-pycs"):
            next(rest, None)  # the value of the option
        elif word == "-" or not word.startswith("-"):
            sees_cwd = word == "-"
            break
        elif not word.startswith(("--", "-W", "-X")):
            flags += _select_flags(word)
            if word[-1] in "cm":
                break
    return Interpreter(path, tuple(dict.fromkeys(flags)), sees_cwd)


def _is_python(path: str) -> bool:
    return re.fullmatch(r"(python|pypy)[0-9.]*[tdw]*", os.path.basename(path)) is not None


def _select_flags(word: str) -> list[str]:
    return [f"-{letter}" for letter in word[1:] if letter in FLAGS]


def _of_script(path: str) -> Interpreter | None:
    """Return the interpreter that the first line of a script names, or pip's second line where the path is long."""
    try:
        with open(path, "rb") as file:
            first, _, rest = file.read(4096).decode(errors="replace").partition("\n")
    except OSError:
        return None
    words = first[2:].split() if first.startswith("#!") else []
    if words and os.path.basename(words[0]) == "env":
        while len(words) > 1 and (words[1].startswith("-") or "=" in words[1]):
            del words[1]
        words = [shutil.which(words[1]) or "", *words[2:]] if len(words) > 1 else []
    elif words and os.path.basename(words[0]) == "sh":
        found = re.match(r"'''exec' [\"']?([^\"'\n ]+)", rest)
        words = [found[1]] if found else []
    if not words or not _is_python(words[0]):
        return None
    flags = [flag for word in words[1:] if word.startswith("-") for flag in _select_flags(word)]
    return Interpreter(words[0], tuple(dict.fromkeys(flags)), sees_cwd=False)


def find_problem(python: Interpreter, environ: Mapping[str, str]) -> str | None:
    """Return why devguard cannot guard what this Python runs, and what to do; None if it can.

    A Python that does not answer is left to the program, with a warning; a strict process does not go on without one.
    """
    name = " ".join([python.path, *python.flags])
    try:
        return _judge(_ask(python, environ), name)
    except (OSError, LookupError, TypeError, ValueError, subprocess.TimeoutExpired) as error:
        problem = f"{name} does not tell whether devguard can guard it ({error})."
    if is_strict(environ):
        return problem
    complain(f"devguard run: warning: {problem} The program is started; devguard.status() in it shows whether it is.")
    return None


def _ask(python: Interpreter, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the interpreter answers."""
    command = [python.path, *python.flags, "-c", PROBE.format(sees_cwd=python.sees_cwd)]
    done = subprocess.run(
        command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        timeout=LIMIT,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"it ended with status {done.returncode}{last and ': '}{last}")
    try:
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (ValueError, RecursionError):
        raise ValueError("its answer cannot be read") from None
    if not isinstance(found, dict):
        raise ValueError("its answer cannot be read")
    return found


def _judge(found: Mapping[str, Any], python: str) -> str | None:
    """Return what is missing, according to the answer of the interpreter called `python`."""
    if tuple(found["python"]) < OLDEST_PYTHON:
        return f"{python} is Python {found['python'][0]}.{found['python'][1]}, and devguard needs 3.10 or newer."
    if "error" in found:
        return f"{python} cannot tell what is installed: {found['error']}."
    for name, requirement in (("torch", "torch>=2.6"), ("wrapt", "wrapt>=2"), ("devguard", "torch-devguard")):
        if not found[f"can import {name}"]:
            failure = found.get(f"failure of {name}", "")
            why = f" ({failure})" if failure else ""
            return f"{python} cannot import {name}{why}. {_advise(requirement, python)}"
    for name, oldest in OLDEST.items():
        numbers = re.match(r"(\d+)\.(\d+)", found.get(name) or "")
        if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
            least = ".".join(map(str, oldest))
            return f"{python} has {name} {found[name]}, and devguard needs {least} or newer. {_advise(name, python)}"
    if not found["entry"]:
        return (
            f"{python} can import devguard, but it is not installed there, so torch does not load it. "
            f"{_advise('torch-devguard', python)}"
        )
    if found.get("torch-devguard") not in (None, __version__):
        return (
            f"{python} has devguard {found['torch-devguard']}, and this command belongs to {__version__}. Use the "
            f"command of that environment: {python} -m devguard run ..."
        )
    return None


def _advise(requirement: str, python: str) -> str:
    """Return what to do about a missing package, which a flag of Python may hide."""
    if any(f"-{flag}" in python.split() for flag in FLAGS):
        return "Leave out the flags of Python that hide installed packages."
    return f"Install it there: {python} -m pip install --upgrade '{requirement}'"
