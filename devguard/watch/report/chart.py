"""The drawing of the memory of each GPU over time, by matplotlib, as SVG for the page.

Its colours are classes of the page's style sheet, so that it follows light and dark, and its text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from devguard.support.terminal import format_size, printable
from devguard.watch.report import svg
from devguard.watch.report.layers import Stack
from devguard.watch.report.markup import Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "MISSING"]

MISSING = (
    "The drawing needs matplotlib. Install it with pip install 'torch-devguard[report]', and make the report again."
)
WIDTH, HEIGHT = 9.2, 1.25  # inches, of the drawing and of one GPU in it
MIB, GIB = 1 << 20, 1 << 30


def draw(stacks: Sequence[Stack], first: float, last: float, worst: float, top: int) -> Html | None:
    """Return the drawing as an ``svg`` element; None if matplotlib is not installed.

    Parameters
    ----------
    stacks : sequence of Stack
        The GPUs.
    first, last : float
        The bounds of the time, in seconds since 1970.
    worst : float
        The moment that is marked.
    top : int
        The bytes that the scale must hold, so that two drawings side by side have the same.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    unit, word = _time_unit(last - first)
    power, size_unit = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    with matplotlib.rc_context({"svg.fonttype": "none", "path.simplify": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(stacks) + 0.5), layout="constrained")
        rows = figure.subplots(len(stacks), 1, sharex=True, sharey=True, squeeze=False)
        for axes, one in zip(rows[:, 0], stacks, strict=True):
            _draw_one(axes, one, [(time - first) / unit for time in (*one.times, last)], power)
            axes.axvline((worst - first) / unit, gid="mark")
            axes.set_xlim(0, max((last - first) / unit, 1e-3))
            axes.set_title(f"{_title(one)}, {size_unit}", loc="left", fontsize=10, parse_math=False)
        rows[0, 0].set_ylim(0, max(top, MIB) * 1.05 / power)
        figure.supxlabel(f"{word} since the start; the dashed line marks the moment of the table above", fontsize=10)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    peaks = "; ".join(f"{_title(one)} at most {format_size(_top(one))}" for one in stacks)
    return svg.clean(written.getvalue(), f"Memory of each GPU over time. {peaks}. The table below has the numbers.")


def _draw_one(axes: Axes, one: Stack, times: list[float], power: int) -> None:
    """Draw one GPU. The layers are drawn from above, each down to zero, so that each needs only its upper edge."""
    total = [0] * len(one.times)
    edges = []
    for layer in one.layers:
        total = [below + own for below, own in zip(total, layer.values, strict=True)]
        edges.append([value / power for value in (*total, total[-1])])
    for layer, edge in reversed(list(zip(one.layers, edges, strict=True))):
        axes.fill_between(times, edge, step="post", linewidth=0, gid=f"layer {layer.kind} shade-{layer.shade}")
    axes.grid(axis="y", color=svg.GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="y", nbins=3)


def _title(one: Stack) -> str:
    label = one.column.label
    return f"GPU {label}" if label.isdecimal() else printable(label)[:20]


def _top(one: Stack) -> int:
    """Return the most bytes that were held at once."""
    return max((sum(values) for values in zip(*(layer.values for layer in one.layers), strict=True)), default=0)


def _time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds of a unit that suits a length of time, and its name."""
    for unit, word in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit:
            return unit, word
    return 1.0, "seconds"
