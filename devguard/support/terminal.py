"""Text for a terminal: all that the commands of devguard print passes through here.

Logs, state files, file names and variables may hold anything, also sequences that would change the terminal. What is
not printable is shown as an escape. Printing does not fail, whatever the encoding of the terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Collection
from itertools import islice
from typing import Any

from devguard.support.notices import print_error

__all__ = ["columns_of", "complain", "cut", "format_size", "list_some", "printable", "show", "show_json", "width"]

NARROWEST = 40


def printable(text: object, *, keep: str = "") -> str:
    """Return `text` with an escape for each character that is not printable, such as ESC, or a change of direction.

    Parameters
    ----------
    text : object
        What to print.
    keep : str
        Characters to keep as they are: a newline between the lines of one message.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escape(char) for char in text)


def show(text: str = "") -> None:
    """Print the lines of `text` on standard output.

    Raises
    ------
    OSError
        If standard output is closed or full.
    """
    text = printable(text, keep="\n")
    try:
        print(text)
    except UnicodeError:  # The terminal's encoding lacks a character.
        print(text.encode(sys.stdout.encoding or "ascii", "backslashreplace").decode(sys.stdout.encoding or "ascii"))


def show_json(value: Any) -> None:
    """Print `value` as JSON on standard output, in ASCII."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def complain(text: str) -> None:
    """Print the lines of `text` on standard error."""
    print_error(printable(text, keep="\n"))


def width() -> int:
    """Return the number of columns of the terminal; 80 if there is none."""
    return max(NARROWEST, shutil.get_terminal_size().columns)


def cut(text: str, columns: int) -> str:
    """Return a printable text, cut to a number of columns, with three dots at its end if it was longer."""
    if text.isascii() and len(text) <= columns:
        return text
    used, fits = 0, 0
    for place, char in enumerate(text):
        used += _columns(char)
        if used > columns:
            return text[:fits] + "..."[: max(columns, 0)]
        if used <= columns - 3:
            fits = place + 1
    return text


def columns_of(text: str) -> int:
    """Return how many columns a printable text takes."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    return 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")


def list_some(values: Collection[object], most: int) -> str:
    """Return the first values of a list as text, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, islice(values, most))) + more


def format_size(nbytes: int) -> str:
    """Return a number of bytes as text, such as 1.5 MiB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
