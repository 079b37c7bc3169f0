"""The memory of each GPU over time as layers, one on top of the other: own memory below, strays above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devguard.watch.matrix import Column
from devguard.watch.report.run import Run

__all__ = ["KINDS", "Layer", "stack", "Stack"]

# The verdict of a layer -> its place from below, and its class in the page's style sheet.
KINDS = {"own": "own", "allowed": "allowed", "ipc": "allowed", "?": "unknown", "ctx": "stray", "STRAY": "stray"}


@dataclass(frozen=True)
class Layer:
    """What one process, or several small ones, held on one GPU.

    Attributes
    ----------
    kind : str
        A value of `KINDS`.
    shade : int
        0 or 1, in turn, so that neighbours differ.
    places : tuple of int
        The processes, by their places in the history.
    values : list of int
        The bytes at each moment of the stack.
    """

    kind: str
    shade: int
    places: tuple[int, ...]
    values: list[int]

    @property
    def most(self) -> int:
        """The most bytes."""
        return max(self.values, default=0)


@dataclass(frozen=True)
class Stack:
    """One GPU over time.

    Attributes
    ----------
    column : Column
        The GPU.
    times : list of float
        The moments, in seconds since 1970. What was held at one counts until the next.
    layers : list of Layer
        From below.
    """

    column: Column
    times: list[float]
    layers: list[Layer]


def stack(run: Run, columns: Sequence[Column], most_moments: int, most_layers: int) -> list[Stack]:
    """Return GPUs of a run over time.

    Parameters
    ----------
    run : Run
        The run.
    columns : sequence of Column
        The GPUs.
    most_moments, most_layers : int
        The most moments, and the most layers of one kind: the smallest others are one layer.
    """
    return [_stack_one(run, column, most_moments, most_layers) for column in columns]


def _stack_one(run: Run, column: Column, most_moments: int, most_layers: int) -> Stack:
    times = run.history.points(column.uuid, most_moments)
    held: dict[tuple[str, int], list[int]] = {}
    for place, track in enumerate(run.tracks):
        for index, time in enumerate(times):
            cell = track.cells(time).get(column.uuid)
            if cell is not None and cell.bytes:
                held.setdefault((KINDS[cell.verdict], place), [0] * len(times))[index] = cell.bytes
    layers: list[Layer] = []
    for kind in dict.fromkeys(KINDS.values()):
        found = [(values, place) for (each, place), values in held.items() if each == kind]
        found.sort(key=lambda pair: (-max(pair[0]), pair[1]))
        groups = [[pair] for pair in found[:most_layers]]
        if len(found) > most_layers:
            groups[-1] += found[most_layers:]
        for shade, group in enumerate(groups):
            summed = [sum(values) for values in zip(*(values for values, _ in group), strict=True)]
            layers.append(Layer(kind, shade % 2, tuple(place for _, place in group), summed))
    return Stack(column, times, layers)
