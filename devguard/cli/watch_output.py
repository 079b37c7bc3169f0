"""The table of ``devguard watch`` as output: printed, as JSON, or saved as a picture; the last needs rich."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
from pathlib import Path

from devguard.errors import ConfigError
from devguard.support.terminal import show, show_json
from devguard.watch.matrix import Matrix
from devguard.watch.screen.table import draw

__all__ = ["as_text", "has_rich", "require_rich", "save_picture", "show_matrix"]

PIPE_WIDTH = 120  # columns where standard output is no terminal


def show_matrix(matrix: Matrix, *, as_json: bool) -> None:
    """Print the table, in colours if the terminal and this environment can; or print the matrix as JSON."""
    if as_json:
        show_json(matrix.as_dict())
    elif sys.stdout is not None and sys.stdout.isatty() and has_rich():
        from rich.console import Console

        from devguard.watch.screen.live import to_text

        console = Console()
        console.print(to_text(draw(matrix, console.width)))
    else:
        show(as_text(matrix))


def as_text(matrix: Matrix) -> str:
    """Return the table without colours, as wide as the terminal."""
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return "\n".join("".join(span.text for span in line).rstrip() for line in draw(matrix, width))


def save_picture(matrix: Matrix, place: Path) -> None:
    """Save the table as SVG.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    from rich.console import Console

    from devguard.watch.screen.live import to_text

    console = Console(record=True, width=PIPE_WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(to_text(draw(matrix, PIPE_WIDTH)))
    try:
        console.save_svg(str(place), title="devguard watch")
    except OSError as error:
        raise ConfigError(f"--svg: {place} cannot be written: {error.strerror}. Choose another file.") from None


def has_rich() -> bool:
    """Return whether rich is installed, which draws colours, pictures and the live screen."""
    return importlib.util.find_spec("rich") is not None


def require_rich(what: str, instead: str) -> None:
    """Raise `ConfigError` if rich is not installed.

    Parameters
    ----------
    what : str
        What needs it.
    instead : str
        How to do without, as the end of a sentence.
    """
    if not has_rich():
        raise ConfigError(f"{what} needs rich. Install it: pip install 'torch-devguard[watch]'; or {instead}.")
