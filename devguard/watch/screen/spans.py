"""Pieces of a line with their styles: the words say all, and colours only repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from devguard.support.terminal import columns_of, cut
from devguard.watch.cells import Verdict

__all__ = ["cut_line", "Span", "STYLES"]

# The style of each verdict, for rich.
STYLES: dict[Verdict, str] = {
    "own": "green",
    "STRAY": "bold white on red",
    "ctx": "black on yellow",
    "ipc": "dim",
    "allowed": "blue",
    "?": "bright_black",
    "foreign": "dim",
}


class Span(NamedTuple):
    """A piece of a line, and its style for rich."""

    text: str
    style: str = ""


def cut_line(line: Sequence[Span], width: int) -> list[Span]:
    """Cut a line to a width."""
    spans, used = [], 0
    for span in line:
        spans.append(Span(cut(span.text, max(width - used, 0)) if used < width else "", span.style))
        used += columns_of(span.text)
    return spans
