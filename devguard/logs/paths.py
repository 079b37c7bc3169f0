"""Names of source files that mean the same on another machine, for baselines, code scanning and comments."""

from __future__ import annotations

import os
import re

__all__ = ["is_source", "name_file", "name_inside"]

# Everything after it is the same in each environment, while what precedes it names the environment and its Python.
_INSTALLED = re.compile(r".*[/\\]((?:site|dist)-packages[/\\].+)", re.DOTALL)


def is_source(file: str) -> bool:
    """Return whether a name of a log can be a file, unlike ``<string>``, or the empty name of no line."""
    return bool(file) and not file.startswith("<") and "\0" not in file


def name_file(file: str, root: str) -> str:
    """Return a name with forward slashes: from ``site-packages`` on, else relative to `root`, else as it is.

    Parameters
    ----------
    file : str
        The path in the log of a process.
    root : str
        The folder of the program's sources, where the process ran.
    """
    installed = _INSTALLED.fullmatch(file)
    if installed:
        return installed[1].replace(os.sep, "/")
    return name_inside(file, root) or file


def name_inside(file: str, root: str) -> str | None:
    """Return the path relative to `root`, with forward slashes; None if it is not inside."""
    if not is_source(file):
        return None
    if not os.path.isabs(file):  # counts from the folder in which the program started
        inside = os.path.normpath(file)
        return None if inside.split(os.sep)[0] == ".." else inside.replace(os.sep, "/")
    file = os.path.normpath(file)
    for folder in (os.path.abspath(root), os.path.realpath(root)):
        if file.startswith(os.path.join(folder, "")):
            return os.path.relpath(file, folder).replace(os.sep, "/")
    return None
